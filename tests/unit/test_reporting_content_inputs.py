"""The report of studies that are partial, large, tiny, empty, odd or hostile still reads right."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, TRIVIAL, Outcome, made_up, record, shifted

from muonlab.registry.snapshot import ArmTuning
from muonlab.registry.verdict import Verdict
from muonlab.reporting.blocks import Bullets, Document, Paragraph, Samples, Table, shortened
from muonlab.reporting.document import build
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import (
    ABSENT,
    broken_guardrails,
    decision_sentence,
    headline,
    limits,
    loss_digits,
    next_step,
    percent_of,
)

HOSTILE = "<script>alert(1)</script> `x` | a\x1b[31m\u202e\n# head"
LONG = "a-very-long-arm-name-with-options-scale-0-95-warmup-150-of-"


def words(document: Document) -> str:
    """All text of a document."""

    def of(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from of(part)
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                yield from of(getattr(value, name))

    return "\n".join(of(document))


def section(document: Document, title: str) -> tuple[object, ...]:
    (found,) = (s.blocks for s in document.sections if s.title == title)
    return found


def tables(document: Document, title: str) -> list[Table]:
    return [block for block in section(document, title) if isinstance(block, Table)]


def column(found: Table, title: str) -> list[str]:
    at = [name for name, _ in found.columns].index(title)
    return [row[at] for row in found.rows]


# A partial report


@pytest.mark.parametrize(
    "standing",
    [
        made_up({"muon": BASELINE, "k": STRONG}, on_archive="orthonoise"),
        made_up({"muon": BASELINE, "k": NOLAH, "l": [*NOISY[:2], None, None, None]}, price=2.8),
        made_up({"muon": [None] * 4, "k": [None] * 4}),
        made_up({"muon": BASELINE, "k": STRONG}, findings=["the ledger lost a line"]),
        made_up({"muon": BASELINE, "k": [*STRONG[:4], "diverged"]}, early={"k": 0.5}, amended=True),
    ],
    ids=["whole", "half", "empty", "contradiction", "diverged"],
)
def test_a_partial_report_says_so_and_judges_nothing(standing: Standing):
    drawn = ("forest", "evidence", "differences")
    document = build(standing, pictures=drawn, partial=True)
    done = sum(c.state in ("completed", "diverged") for c in standing.cells)
    assert document.partial
    assert document.headline.startswith(f"Partial: {done} of {len(standing.cells)} declared runs have an outcome")
    assert document.lead[0].startswith("This report is partial, made while the study runs: ")
    assert f"{done} of {len(standing.cells)} declared runs" in document.lead[0]
    assert len(document.lead) == 3
    text = words(document)
    for verdict in Verdict:
        assert not re.search(rf"\b{verdict.value}\b", text), verdict
    assert not re.search(
        r"\barchive|adopt|pivot to|undecided|keep muon|next pair|Next:|\bMend\b|guardrail failed", text, re.I
    )
    assert decision_sentence(standing) not in text
    assert next_step(standing) not in text
    assert "verdict" not in [name for t in tables(document, "Comparisons") for name, _ in t.columns]
    titles = [s.title for s in document.sections]
    assert "Reasons" not in titles
    assert "Limits of this study" not in titles
    assert "Paired differences" in titles
    whole = build(standing, pictures=drawn)
    assert not whole.partial
    assert "verdict" in [name for t in tables(whole, "Comparisons") for name, _ in t.columns]


def test_a_contradiction_is_told_before_the_study_ends():
    standing = made_up({"muon": BASELINE, "k": STRONG}, findings=["the ledger lost a line"])
    assert "Contradiction: the ledger lost a line" in build(standing, pictures=(), partial=True).warnings


# Size


@pytest.fixture(scope="module")
def large() -> Standing:
    arms: dict[str, list[Outcome]] = {"muon": [4.2 + 0.01 * (seed % 7) for seed in range(20)]}
    for i in range(19):
        arms[f"arm{i:02d}"] = [4.2 + 0.002 * i + 0.01 * ((seed * (i + 2)) % 11) for seed in range(20)]
    lost = [record(arm, seed, "failed", attempt=0) for arm in arms for seed in range(20)]
    return made_up(
        arms,
        decision={"plan": {"fixed": 20}, "n_max": 20},
        extra_records=lost,
        reference=[f"arm{i:02d}" for i in range(10, 19)],
    )


def test_twenty_arms_and_seeds_stay_readable(large: Standing):
    began = time.process_time()
    document = build(large, pictures=())
    assert time.process_time() - began < 2
    (runs,) = tables(document, "Every run")
    assert runs.collapsed
    assert len(runs.rows) == 400
    assert any(
        isinstance(b, Paragraph) and "400 of 400 declared runs" in b.text for b in section(document, "Every run")
    )
    order = large.snapshot.study.arms
    for title in ("Comparisons", "Early stability", "Speed to target", "Cost"):
        arms = column(tables(document, title)[0], "arm")
        assert arms == sorted(arms, key=order.index), title
        assert len(arms) == 19, title
    (noted,) = (b for b in section(document, "Every run") if isinstance(b, Bullets))
    assert len(large.notes) >= 400
    assert len(noted.sentences) <= 8
    assert any("and 397 more of this kind" in text for text in noted.sentences)
    assert len(document.headline) < 300
    assert all(c.arm in document.lead[0] for c in large.decided)
    assert len(document.warnings) <= 5
    (bounds,) = (b for b in section(document, "Limits of this study") if isinstance(b, Bullets))
    assert len(bounds.sentences) < 15
    assert max(map(len, bounds.sentences)) < 500
    assert not tables(build(made_up({"muon": BASELINE, "k": NOLAH}), pictures=()), "Every run")[0].collapsed


def test_hundreds_of_findings_are_counted():
    findings = [f"cell k-{i}: its weights score {4 + i / 7} nats/token" for i in range(300)]
    document = build(made_up({"muon": BASELINE, "k": NOLAH}, findings=[*findings, "a file is gone"]), pictures=())
    assert [w for w in document.warnings if "297 more of this kind" in w]
    assert "INVALID: a file is gone" in document.warnings
    assert len(document.warnings) == 5
    (reasons,) = (b for b in section(document, "Reasons") if isinstance(b, Bullets))
    assert len(reasons.sentences) < 12


@given(st.lists(st.sampled_from(["cell muon-1 is lost", "cell k-23 is lost", "no seed", "no weights"]), max_size=60))
def test_what_is_left_out_is_counted_right(sentences):
    shown = shortened(sentences, ["muon", "k"])
    left_out = [int(x) for text in shown for x in re.findall(r"^and (\d+) more", text)]
    assert len(shown) - len(left_out) + sum(left_out) == len(sentences)
    assert [text for text in shown if not text.startswith("and ")] == [
        text for i, text in enumerate(sentences) if _kept(sentences, i)
    ]


def _kept(sentences: list[str], i: int) -> bool:
    def kind(text: str) -> str:
        return "cell" if text.startswith("cell") else text

    alike = [j for j, text in enumerate(sentences) if kind(text) == kind(sentences[i])]
    return len(alike) <= 6 or i in alike[:3]


# Odd studies


def test_a_study_without_runs_has_a_report():
    document = build(made_up({"muon": [None] * 3, "k": [None] * 3}), pictures=())
    assert document.headline == "INCOMPLETE: no verdict yet on k."
    assert "none of its runs has been made" in document.lead[0]
    titles = [s.title for s in document.sections]
    assert not {"Early stability", "Speed to target", "Diagnostics"} & set(titles)
    assert column(tables(document, "Every run")[0], "status") == ["missing"] * 6
    assert column(tables(document, "Every run")[0], "loss [nats/token]") == [ABSENT] * 6
    assert column(tables(document, "Comparisons")[1], "missing in it or the baseline") == ["3: seeds 0, 1 and 2"]


def test_a_study_with_one_run_has_a_report():
    document = build(made_up({"muon": [4.2, None], "k": [None, None]}, price=2.8), pictures=())
    assert "no pair" in words(document)
    assert "muon ends at 4.2000 nats/token on average." in words(document)
    assert column(tables(document, "Comparisons")[0], "pairs") == ["0"]
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", words(document))


def test_a_study_of_failures_says_what_failed():
    document = build(made_up({"muon": ["failed"] * 2, "k": ["failed", "abandoned"]}), pictures=())
    assert "0 of 4 declared runs have an outcome (3 failed, 1 abandoned)" in document.lead[2]
    assert column(tables(document, "Comparisons")[1], "failed") == ["1: seed 0"]
    assert all("OutOfMemory" in text for text in column(tables(document, "Every run")[0], "error"))
    assert not re.search(r"no effect|no difference", words(document))


def test_one_arm_cannot_be_declared():
    with pytest.raises(ValidationError, match="challengers is empty"):
        made_up({"muon": BASELINE})


def test_names_of_63_characters_stand_whole_in_the_tables():
    names = [(LONG + tail).ljust(63, "x") for tail in ("muon", "one", "two")]
    standing = made_up(dict(zip(names, (BASELINE, NOLAH, TRIVIAL), strict=True)))
    document = build(standing, pictures=())
    for title in ("Comparisons", "Early stability", "Speed to target", "Cost"):
        assert column(tables(document, title)[0], "arm") == names[1:]
    assert names[1] in document.lead[0]


def test_losses_that_differ_by_1e_9_are_told_apart():
    gains = [1e-9, -2e-9, 3e-9, 1e-9, 2e-9]
    standing = made_up({"muon": BASELINE, "k": shifted(gains)})
    document = build(standing, pictures=())
    effects = tables(document, "Comparisons")[0]
    assert float(column(effects, "better by [nats/token]")[0]) == pytest.approx(1e-9, rel=0.01)
    (low, high) = re.findall(r"[+-][\d.e-]+", column(effects, "95% interval")[0])
    assert float(low) < 1e-9 < float(high)
    losses = column(tables(document, "Every run")[0], "loss [nats/token]")
    assert len(set(losses)) == len(losses)
    pairs = [(float(a), float(b)) for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [a - b for a, b in pairs] == pytest.approx(gains, abs=1e-10)
    lag = tables(document, "Early stability")[0]
    assert all("0.00%" not in cell for row in lag.rows for cell in row)
    assert not re.search(r"(?<![\d.])[+-]?0\.0+(?![\d.])", str(effects.rows))


def test_losses_of_1e9_are_told_apart():
    standing = made_up({"muon": [1e9, 1.1e9, 1.2e9, 1.3e9], "k": [2e9, 1.3e9, 1.1e9, 9e8]})
    document = build(standing, pictures=())
    losses = column(tables(document, "Every run")[0], "loss [nats/token]")
    assert [float(x.replace(",", "")) for x in losses] == pytest.approx(
        [1e9, 2e9, 1.1e9, 1.3e9, 1.2e9, 1.1e9, 1.3e9, 9e8]
    )
    mean = column(tables(document, "Comparisons")[0], "better by [nats/token]")[0]
    assert float(mean.replace(",", "")) == pytest.approx(-1.75e8, rel=0.01)
    assert max(len(x) for x in losses) < 14
    assert not re.search(r"\bnan\b|\binf\b", words(document))


@given(st.lists(st.floats(1e-11, 1.0), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_digits_tell_a_typical_pair_apart(gains):
    standing = made_up({"muon": BASELINE[:3], "k": shifted(gains, BASELINE[:3])})
    digits = loss_digits(standing, 6)
    assert 6 <= digits <= 12
    typical = sorted(abs(pair.difference) for pair in standing.comparisons[0].differences)[1]
    if digits < 12:
        assert typical >= 10 ** (1 - digits)


def test_foreign_text_is_spelled_out():
    standing = made_up(
        {"muon": BASELINE, "k": [*NOLAH[:4], None]},
        question=HOSTILE,
        findings=[HOSTILE],
        samples={"muon": HOSTILE, "k": ""},
        extra_records=[record("k", 4, "failed", error=HOSTILE)],
    )
    document = build(standing, pictures=())
    text = words(document)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x1b[31m\u202e" in text
    (samples,) = (b for b in section(document, "What the models write") if isinstance(b, Samples))
    assert dict(samples.written)["muon"].count("\n") == 1
    assert "\n" not in document.question


# Wording


def test_a_fraction_is_never_printed_as_nothing_but_nothing():
    assert [percent_of(x) for x in (0.0, 0.0938, -0.0234, 0.00005, -3e-11)] == [
        "0%", "+9.38%", "-2.34%", "+0.0050%", "-3.00e-09%",
    ]  # fmt: skip


@given(st.floats(-10, 10))
def test_a_fraction_keeps_its_sign_and_size(fraction):
    text = percent_of(fraction)
    assert float(text.rstrip("%").replace(",", "")) == pytest.approx(100 * fraction, abs=0.005, rel=6e-3)
    assert (text == "0%") == (fraction == 0)


def test_a_title_names_a_few_and_the_sentence_all():
    arms = {f"a{i}": NOLAH for i in range(9)}
    standing = made_up({"muon": BASELINE, **arms})
    assert headline(standing) == "Undecided on a0, a1, a2 and 6 more."
    assert all(arm in decision_sentence(standing) for arm in arms)


def test_who_tuned_the_arms_stands_beside_their_options():
    standing = made_up({"muon": BASELINE, "k": NOLAH}, tuning="900-tune")
    chosen = ArmTuning(study="900-tune", runs=4, seeds=[9], tried={"lr": [0.01]}, chosen={"lr": 0.01}, in_use=True)
    for used, said in ((True, "900-tune"), (False, "untuned")):
        tuning = {"muon": chosen.model_copy(update={"in_use": used})}
        snapshot = standing.snapshot.model_copy(update={"tuning": tuning})
        document = build(standing.model_copy(update={"snapshot": snapshot}), pictures=())
        options = next(t for t in tables(document, "What was declared") if t.columns[0][1] == "arm")
        assert column(options, "tuned by") == [said, "untuned"]


def test_the_limits_of_many_arms_have_one_range():
    arms = {f"a{i}": shifted([0.01 * i + x for x in (0.01, -0.02, 0.015, -0.01, 0.005 * i)]) for i in range(6)}
    standing = made_up({"muon": BASELINE, **arms})
    sizes = [c.estimates.mde_80 for c in standing.decided]
    (few,) = (text for text in limits(standing) if text.startswith("Few seeds"))
    low, high = (float(x) for x in re.findall(r"would find ([\d.]+) to ([\d.]+) nats/token, by arm", few)[0])
    assert (low, high) == pytest.approx((min(sizes), max(sizes)), rel=6e-3)


def test_a_broken_guardrail_stands_beside_the_verdict_in_the_table():
    standing = made_up({"muon": BASELINE, "k": STRONG}, early={"k": 0.5})
    assert broken_guardrails(standing, standing.comparisons[0])
    assert column(tables(build(standing, pictures=()), "Comparisons")[0], "verdict") == ["NO_GO, guardrail failed"]
