"""The rendered report: the same bytes, nothing active, everything said, whatever the study looks like."""

from __future__ import annotations

import base64
import itertools
import math
import re
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib import get_data_path
from matplotlib.font_manager import get_font
from reporting_studies import BASELINE, NOISY, NOLAH, STEPS, STRONG, TRIVIAL, made_up, record, shifted

from muonlab.reporting.document import Table, one_line, visible
from muonlab.reporting.figures import labels, lines, paper
from muonlab.reporting.figures.curves import early, losses
from muonlab.reporting.figures.diagnostics import diagnostics
from muonlab.reporting.report import escape_inline, escape_markdown, fenced, markdown_table, rich_html, write_report
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import decision_sentence

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> & &lt; \"'|pipe| `tick ``` *a* _b_ [x](http://y) "
    "![z](data:q) $m$ ~~s~~\n# head\n- item\n1. one\n\x1b[31mred\x00 \u202ertl \u2028 {{ 7*7 }} {% raw %} \t end\n"
)
LONG = "a-very-long-arm-name-with-options-scale-0-95-warmup-150-of-"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def measured(size: float, seed: int) -> dict[str, list[tuple[int, float]]]:
    """What the optimizer did in a run whose momentum has this size."""
    steps = range(30, STEPS + 1, 30)
    return {
        "grad_norm": [(step, 1 + math.sin(step + seed)) for step in steps],
        "opt_momentum_rms": [(step, size * (1 + seed + step / STEPS)) for step in steps],
        "opt_turn": [(step, 0.0) for step in steps],
    }


def studies() -> dict[str, Standing]:
    return {
        "whole": made_up(
            {
                "muon": BASELINE,
                "nolah": NOLAH,
                "orthonoise": TRIVIAL,
                "isotropic": NOISY,
                "adamw": shifted([-0.3] * 4 + [-0.4]),
            },
            control=["isotropic"],
            reference=["adamw"],
            on_archive="orthonoise",
            samples={"muon": "the city of the city", "nolah": HOSTILE},
            series={"muon": partial(measured, 1.0), "nolah": partial(measured, 1e-3)},
        ),
        "no run": made_up({"muon": [None] * 3, "k": [None] * 3}),
        "one run": made_up({"muon": [4.2, None], "k": [None, None]}, price=2.8),
        "one pair": made_up({"muon": [4.2, None], "k": [4.1, None]}, price=2.8),
        "only failures": made_up({"muon": ["failed"] * 2, "k": ["failed", "abandoned"]}),
        "divergences": made_up(
            {"muon": [*BASELINE[:4], "diverged"], "k": [*NOLAH[:3], "diverged", "diverged"]}, price=2.8
        ),
        "all diverge": made_up({"muon": BASELINE, "k": ["diverged"] * 5}),
        "an arm missing": made_up({"muon": BASELINE, "k": STRONG, "l": [None] * 5}),
        "long names, fixed plan": made_up(
            {LONG + "muon": BASELINE, LONG + "one": NOLAH, LONG + "two": TRIVIAL},
            decision={"plan": {"fixed": 5}, "min_effect": 0.01},
        ),
        "alike to 1e-9": made_up({"muon": BASELINE, "k": shifted([1e-9, -2e-9, 3e-9, 1e-9, 2e-9])}),
        "huge": made_up({"muon": [1e9, 1.1e9, 1.2e9, 1.3e9], "k": [2e9, 1.3e9, 1.1e9, 9e8]}),
        "hostile": made_up(
            {"muon": BASELINE, "k": [*NOLAH[:4], None]},
            question=HOSTILE,
            findings=[HOSTILE],
            extra_records=[record("k", 4, "failed", error=HOSTILE)],
        ),
    }


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Standing, Path]]:
    found = {}
    for name, standing in studies().items():
        out = tmp_path_factory.mktemp("report")
        write_report(standing, out)
        found[name] = (standing, out)
    return found


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.samples: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "pre":
            self.samples.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "pre":
            self.samples[-1] += data
        if self.inside != "style":
            self.text += data


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    standing = studies()["one pair"]
    first = write_report(standing, tmp_path / "a")
    second = write_report(Standing.model_validate(standing.model_dump()), tmp_path / "b")
    assert [p.name for p in first] == [p.name for p in second]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_every_study_reads_right(rendered):
    for name, (standing, out) in rendered.items():
        page = Page((out / "report.html").read_text())
        markdown = (out / "report.md").read_text()
        for text in (page.text, markdown):
            assert not re.search(r"\b(nan|None|inf|Undefined)\b|[Nn]oneType", text), name
        # What is quoted stands in both, first.
        sentence = decision_sentence(standing)
        assert "".join(sentence.replace("`", "").split())[:60] in "".join(page.text.split()), name
        assert markdown.startswith("# "), name
        assert len(MARKDOWN.parse(markdown)) > 20, name


def test_markdown_holds_no_markup_of_others(rendered):
    for name, (_, out) in rendered.items():
        tokens = MARKDOWN.parse((out / "report.md").read_text())
        flat = [t for token in tokens for t in [token, *(token.children or [])]]
        assert not [t for t in flat if t.type in ("html_block", "html_inline", "link_open", "em_open", "s_open")], name
        assert {t.attrs["src"] for t in flat if t.type == "image"} <= {f"figures/{f}.svg" for f in figure_names()}, name
        heads = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h1"]
        assert len(heads) == 1, name


def figure_names() -> list[str]:
    return ["forest", "evidence", "evidence_below", "differences", "losses", "early", "finish", "diagnostics"]


def test_html_is_self_contained_and_inert(rendered):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for name, (_, out) in rendered.items():
        html = (out / "report.html").read_text()
        page = Page(html)
        assert policy in [value for key, value in page.attributes if key == "content"], name
        assert not {"script", "iframe", "link", "object", "svg", "b"} & set(page.tags), name
        assert not [key for key, _ in page.attributes if key.startswith("on")], name
        # Every link stays on the page, and finds what it points to.
        places = [value for key, value in page.attributes if key == "id"]
        assert len(set(places)) == len(places) > 0, name
        assert {value for key, value in page.attributes if key == "href"} == {f"#{place}" for place in places}, name
        sources = [value or "" for key, value in page.attributes if key in ("src", "srcset")]
        assert all(re.fullmatch(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", source) for source in sources), name
        assert len([key for key, value in page.attributes if key == "alt" and value]) == page.tags.count("img"), name
        assert len(html) < 1_000_000, name


def test_samples_are_shown_as_written(rendered):
    page = Page((rendered["whole"][1] / "report.html").read_text())
    assert visible(HOSTILE) in page.samples
    assert "\x1b" not in "".join(page.samples)
    fences = [t.content for t in MARKDOWN.parse((rendered["whole"][1] / "report.md").read_text()) if t.type == "fence"]
    assert visible(HOSTILE).strip("\n") + "\n" in fences


def test_the_figures_are_there_and_stale_ones_are_not(rendered, tmp_path):
    _, out = rendered["whole"]
    assert sorted(p.stem for p in (out / "figures").iterdir()) == sorted(figure_names())
    write_report(made_up({"muon": BASELINE, "k": NOLAH}), tmp_path)
    written = write_report(made_up({"muon": [4.2], "k": [None]}), tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(p.name for p in written)
    assert not (tmp_path / "figures" / "forest.svg").exists()


def test_the_table_shows_every_arm_with_its_numbers(rendered):
    standing, out = rendered["whole"]
    rows = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")]
    for c in standing.comparisons:
        shown = next(row for row in rows if row.startswith(f"| {c.arm} "))
        cells = [cell.strip() for cell in shown.strip("|").split("|")]
        assert cells[1].startswith(c.decision.verdict.value if c.decision else c.role)
        assert float(cells[2]) == pytest.approx(c.estimates.mean_diff, abs=1e-3)
        assert cells[6] == str(c.estimates.n)
        assert float(cells[7]) == pytest.approx(c.estimates.e_value, rel=5e-3)


def test_a_partial_or_invalid_study_warns_on_top(rendered):
    for name in ("an arm missing", "no run", "one pair"):
        assert "report is partial" in (rendered[name][1] / "report.md").read_text().split("##")[0], name
    hostile = (rendered["hostile"][1] / "report.md").read_text().split("##")[0]
    assert "INVALID" in hostile
    assert "report is partial" not in (rendered["whole"][1] / "report.md").read_text()


def test_price_decides_between_dollars_and_seconds(rendered):
    free = (rendered["whole"][1] / "report.md").read_text()
    paid = (rendered["divergences"][1] / "report.md").read_text()
    assert not re.search(r"\$\d", free)
    assert "s per percentage point" in free
    assert "a GPU hour" in paid


def test_one_cell_says_whether_it_belongs_to_the_grid(tmp_path):
    standing = made_up({"muon": [4.2], "k": [4.1]})
    inside = record("k", 0, 4.1)
    write_report(standing, tmp_path, cell=inside)
    text = (tmp_path / "report.md").read_text()
    assert text.index("This cell") < text.index("## Paired differences")
    assert "declared as k-0" in text
    write_report(standing, tmp_path, cell=record("k", 0, 4.0, cell_digest="5" * 64))
    assert "outside the declared grid, not counted" in (tmp_path / "report.md").read_text()
    assert "outside the declared grid" in (tmp_path / "report.html").read_text()


def test_every_colour_has_its_night(rendered):
    _, out = rendered["whole"]
    for name in figure_names():
        svg = (out / "figures" / f"{name}.svg").read_text()
        assert set(re.findall(r"#[0-9a-f]{6}\b(?![0-9a-f])", svg.replace("xlink:href", ""))) <= set(paper.DARK), name
        assert not set(re.findall(r"#[0-9a-f]{6}\b", paper.dark(svg))) & set(paper.DARK), name
    html = (out / "report.html").read_text()
    sources = re.findall(r'src(?:set)?="data:image/svg\+xml;base64,([^"]+)"', html)
    assert base64.b64encode((out / "figures" / "forest.svg").read_bytes()).decode() in sources


def texts(svg: str) -> str:
    """What is written on a figure, in order of drawing: its glyphs are named by their number in the font."""
    letters = {}
    for weight, font in (("n", "DejaVuSans.ttf"), ("b", "DejaVuSans-Bold.ttf")):
        charmap = get_font(str(Path(get_data_path()) / "fonts" / "ttf" / font)).get_charmap()
        letters |= {f"{weight}{glyph:x}": chr(code) for code, glyph in sorted(charmap.items(), reverse=True)}
    drawn = "".join(letters[name] for name in re.findall(r'<use href="#([nb][0-9a-f]+)"', svg))
    return drawn.replace("\ufb01", "fi")


def test_a_partial_report_says_so_and_gives_no_verdict(tmp_path):
    standing = made_up({"muon": BASELINE, "k": STRONG, "l": [*TRIVIAL[:4], None]})
    write_report(standing, tmp_path, partial=True)
    page = Page((tmp_path / "report.html").read_text())
    shown = [page.text, (tmp_path / "report.md").read_text(), texts((tmp_path / "figures/forest.svg").read_text())]
    assert not [
        word for word in ("GO", "NO_GO", "INCONCLUSIVE", "INCOMPLETE", "EQUIVALENT") for t in shown if word in t
    ]
    assert all("partial" in text.lower() for text in shown[:2])
    write_report(standing, tmp_path)
    assert "INCOMPLETE" in texts((tmp_path / "figures/forest.svg").read_text())


def test_a_long_table_is_folded_and_a_short_one_is_not(rendered, tmp_path):
    runs = [4.2 + 0.001 * i for i in range(13)]
    write_report(made_up({f"arm-{i}": runs for i in range(5)}, decision={"n_max": 20}), tmp_path)
    folded = Page((tmp_path / "report.html").read_text())
    assert "details" in folded.tags
    assert "all 65 rows" in folded.text
    assert "details" not in Page((rendered["one pair"][1] / "report.html").read_text()).tags


def test_diagnostics_are_drawn_where_they_say_something(rendered):
    drawn = texts((rendered["whole"][1] / "figures" / "diagnostics.svg").read_text())
    assert "size of the momentum" in drawn
    assert "10⁻³" in drawn  # its sizes are decades apart
    assert "turn from" not in drawn  # 0 in all runs
    assert "nolah" in drawn
    assert "orthonoise" not in drawn  # has no series
    assert not (rendered["one pair"][1] / "figures" / "diagnostics.svg").exists()


def test_an_eigenvalue_that_was_not_found_is_not_drawn(tmp_path):
    def of_seed(seed: int) -> dict[str, list[tuple[int, float]]]:
        return {"hessian_top": [(30, 5.0 + seed), (60, 7.0)], "hessian_residual": [(30, 9.0), (60, 9.0)]}

    standing = made_up({"muon": BASELINE, "k": NOLAH}, series={"muon": of_seed})
    assert diagnostics(standing) is None


def test_the_early_phase_needs_two_evaluations():
    assert early(made_up({"muon": BASELINE, "k": NOLAH})) is not None
    one = [{"step": step, "val_loss": 5.0 - step / 100} for step in (0, 60, 120, 300)]
    standing = made_up(
        {"muon": [None], "k": [None]}, extra_records=[record(arm, 0, 2.0, curve=one) for arm in ("muon", "k")]
    )
    assert losses(standing) is not None
    assert early(standing) is None


def test_twenty_arms_look_different_also_in_print():
    standing = made_up({"muon": [4.2], **{f"arm-{i}": [4.1] for i in range(32)}})
    looks = [paper.look(standing, arm) for arm in standing.snapshot.study.arms]
    assert len({(look.marker, look.dash) for look in looks[1:]}) == 32
    assert looks[0].colour not in {look.colour for look in looks[1:]}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours #rrggbb (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


def test_figures_can_be_read_by_day_and_by_night():
    for turn in (lambda colour: colour, paper.DARK.__getitem__):
        for ground in (paper.PAPER, paper.BAND):
            assert min(contrast(turn(text), turn(ground)) for text in (paper.INK, paper.MUTED)) >= 4.5
        # Lines and marks: 3, as for any graphical object.
        assert min(contrast(turn(colour), turn(paper.PAPER)) for colour in paper.ARM_COLOURS) >= 3


@given(
    st.lists(st.tuples(st.sampled_from("MLQCz"), st.lists(st.integers(-99, 99), min_size=6, max_size=6)), max_size=12)
)
def test_a_shorter_path_is_the_same_path(commands):
    sizes = {"M": 2, "L": 2, "Q": 4, "C": 6, "z": 0}

    def read(path: str) -> list[tuple[str, tuple[str, ...]]]:
        """Every command with its numbers, those that are left out as SVG says."""
        found, words, letter = [], iter(path.split()), ""
        for word in words:
            letter, first = (word, []) if word.isalpha() else ({"M": "L"}.get(letter, letter), [word])
            found.append((letter, (*first, *itertools.islice(words, sizes[letter] - len(first)))))
        return found

    whole = " ".join(" ".join([letter, *map(str, numbers[: sizes[letter]])]) for letter, numbers in commands)
    assert read(paper.compact(whole)) == read(whole)


@pytest.mark.slow
def test_twenty_arms_and_twenty_seeds_are_drawn_in_time(tmp_path):
    runs = [4.2 + 0.01 * math.sin(i) for i in range(20)]
    arms = {
        "muon": runs,
        **{f"arm-{k}": [r + 0.002 * k * math.cos(k * i) for i, r in enumerate(runs)] for k in range(19)},
    }
    standing = made_up(arms, decision={"n_max": 20}, series={arm: partial(measured, 1.0) for arm in arms})
    started = time.process_time()
    write_report(standing, tmp_path)
    assert time.process_time() - started < 30


def test_a_mean_is_never_over_survivors():
    assert lines.mean([{1: 2.0, 2: 3.0, 3: 9.0}, {1: 4.0, 2: 5.0}]) == {1: 3.0, 2: 4.0}


@given(
    st.lists(st.floats(-50, 250), min_size=1, max_size=12),
    st.floats(1, 15),
)
def test_labels_keep_apart_and_in_order(wanted, gap):
    placed = labels.spread(wanted, gap, 0.0, 200.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    along = [placed[i] for i in order]
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(along))
    if gap * (len(wanted) - 1) <= 200:
        assert along[0] >= -1e-6
        assert along[-1] <= 200 + 1e-6
    if len(wanted) == 1:
        assert placed == [min(max(wanted[0], 0.0), 200.0)]


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=40), min_size=1, max_size=6, unique=True))
def test_short_names_stay_apart(names):
    short = labels.short_names(names, 12)
    assert len(set(short.values())) == len(names)
    assert all(len(text) <= 12 for text in short.values())


@given(st.text(max_size=80) | st.text(alphabet="<>&`*_[]()!|\\#-+=~$1. ahtp:/;\n", max_size=40))
@settings(max_examples=300)
def test_markdown_shows_any_text_as_it_is(text):
    expected = one_line(text)
    tokens = MARKDOWN.parse(escape_markdown(expected))
    assert [t.type for t in tokens] in ([], ["paragraph_open", "inline", "paragraph_close"])
    children = tokens[1].children or [] if tokens else []
    assert {t.type for t in children} <= {"text", "code_inline", "text_special"}
    shown = "".join(t.content for t in children).replace("\u200b", "")
    assert "".join(shown.split()) == "".join(expected.replace("`", "" if expected.count("`") % 2 == 0 else "`").split())
    cell = escape_inline(expected)
    rows = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {cell} | x |\n")
    assert sum(t.type == "td_open" for t in rows) == 2


@given(st.text(max_size=80), st.sampled_from(["text", "code", "prose"]))
def test_a_markdown_table_keeps_its_cells(text, kind):
    table = Table((("first", kind), ("second", "number")), ((one_line(text), "1"), ("x", "22")))
    tokens = MARKDOWN.parse(markdown_table(table))
    assert sum(t.type == "td_open" for t in tokens) == 4


@given(st.text(alphabet="`\nab ~", max_size=40))
def test_no_text_ends_its_fence(text):
    tokens = MARKDOWN.parse(fenced(text) + "\n\nafter\n")
    assert [t.type for t in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@given(st.text(max_size=80))
def test_html_shows_any_text_as_it_is(text):
    page = Page(str(rich_html(visible(text))))
    assert set(page.tags) <= {"code"}
    assert page.attributes == []


@given(st.text())
def test_nothing_invisible_is_left(text):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\ufeff]", visible(text))
