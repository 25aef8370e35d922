"""The rendered report: the same bytes, nothing active, everything said, whatever the study looks like."""

from __future__ import annotations

import base64
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, TRIVIAL, made_up, record, shifted

from muonlab.reporting import figures
from muonlab.reporting.document import Table, one_line, visible
from muonlab.reporting.report import escape_inline, escape_markdown, fenced, markdown_table, rich_html, write_report
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import decision_sentence

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> & &lt; \"'|pipe| `tick ``` *a* _b_ [x](http://y) "
    "![z](data:q) $m$ ~~s~~\n# head\n- item\n1. one\n\x1b[31mred\x00 \u202ertl \u2028 {{ 7*7 }} {% raw %} \t end\n"
)
LONG = "a-very-long-arm-name-with-options-scale-0-95-warmup-150-of-"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


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
    return ["forest", "evidence", "differences", "losses", "finish"]


def test_html_is_self_contained_and_inert(rendered):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for name, (_, out) in rendered.items():
        html = (out / "report.html").read_text()
        page = Page(html)
        assert policy in [value for key, value in page.attributes if key == "content"], name
        assert not {"script", "iframe", "link", "object", "a", "svg", "b"} & set(page.tags), name
        assert not [key for key, _ in page.attributes if key.startswith("on") or key == "href"], name
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
        assert set(re.findall(r"#[0-9a-f]{6}\b(?![0-9a-f])", svg.replace("xlink:href", ""))) <= set(figures.DARK), name
        assert not set(re.findall(r"#[0-9a-f]{6}\b", figures.dark(svg))) & set(figures.DARK), name
    html = (out / "report.html").read_text()
    sources = re.findall(r'src(?:set)?="data:image/svg\+xml;base64,([^"]+)"', html)
    assert base64.b64encode((out / "figures" / "forest.svg").read_bytes()).decode() in sources


def test_a_mean_is_never_over_survivors():
    assert figures._mean([{1: 2.0, 2: 3.0, 3: 9.0}, {1: 4.0, 2: 5.0}]) == {1: 3.0, 2: 4.0}


@given(
    st.lists(st.floats(-50, 250), min_size=1, max_size=12),
    st.floats(1, 15),
)
def test_labels_keep_apart_and_in_order(wanted, gap):
    placed = figures.spread(wanted, gap, 0.0, 200.0)
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
    short = figures.short_names(names, 12)
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
