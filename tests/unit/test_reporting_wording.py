"""The sentences of a report: the verdict first, honest, and every number that of the object."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, TRIVIAL, at_prices, made_up, record, shifted

from muonlab.registry.verdict import Verdict
from muonlab.reporting.document import build
from muonlab.reporting.standing import Standing, verdict_json
from muonlab.reporting.wording import (
    ABSENT,
    bracket,
    decision_sentence,
    duration,
    half_width,
    headline,
    limits,
    money,
    next_step,
    plain,
    signed,
    worst_pair,
)

NUMBER = r"[+-]?[\d,]+(?:\.\d+)?(?:e[+-]\d+)?"


def verdict(standing: Standing, arm: str) -> Verdict:
    decision = next(c.decision for c in standing.comparisons if c.arm == arm)
    assert decision is not None
    return decision.verdict


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_no_go_archives_and_pivots_to_the_declared_next_method():
    standing = made_up({"muon": BASELINE, "nolah": NOLAH}, on_archive="orthonoise")
    assert verdict(standing, "nolah") is Verdict.NO_GO
    assert decision_sentence(standing) == (
        "Archive nolah and pivot to orthonoise: an improvement over muon of 0.5% of muon's mean loss (0.0214 "
        "nats/token) is ruled out after 5 pairs (effect -0.0140 nats/token, 95% interval [-0.0267, -0.0012]). Shown on "
        "tiny alone, which trains 3 layers of width 64 on 153,600 tokens (300 steps of 4 x 128)."
    )
    assert headline(standing) == "Archive nolah. On tiny alone."
    assert next_step(standing).startswith("Archive nolah and pivot to orthonoise;")


def test_go_names_what_is_established_and_what_is_only_estimated():
    standing = made_up({"muon": BASELINE, "nolah": STRONG})
    assert verdict(standing, "nolah") is Verdict.GO
    sentence = decision_sentence(standing)
    assert sentence.startswith(
        "Adopt nolah in place of muon: an improvement is established after 5 pairs (effect +0.05"
    )
    assert "its estimate reaches the smallest effect worth having, 0.5% of muon's mean loss" in sentence


def test_equivalent_is_within_the_margin_and_not_no_effect():
    standing = made_up({"muon": BASELINE, "k": TRIVIAL})
    assert verdict(standing, "k") is Verdict.EQUIVALENT
    sentence = decision_sentence(standing)
    assert sentence.startswith(
        "Archive k as equivalent to muon and keep muon: after 5 pairs a difference of 0.5% of muon"
    )
    assert "in both directions" in sentence


def test_inconclusive_says_what_the_next_pairs_cost():
    standing = made_up({"muon": BASELINE, "k": NOISY}, price=2.8)
    decision = standing.comparisons[0].decision
    assert decision is not None
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.next_pairs is not None
    assert decision.next_cost_usd is not None
    sentence = decision_sentence(standing)
    assert sentence.startswith("Undecided on k: after 5 pairs")
    assert "neither ruled out nor established enough to adopt" in sentence
    assert f"the next {decision.next_pairs} pairs ({money(decision.next_cost_usd)}, about" in sentence
    assert f"{decision.decision_chance:.0%}" in sentence
    assert "$" not in decision_sentence(made_up({"muon": BASELINE, "k": NOISY}))


def test_the_pairs_of_an_arm_have_one_price_wherever_it_is_said():
    """Each challenger asks for pairs at its own price, in verdict.json as in the sentence to quote."""
    open_ = shifted([0.02, 0.005, 0.03, 0.01, 0.012])
    standing = at_prices(made_up({"muon": BASELINE, "cheap": open_, "dear": NOISY}, price=2.8), {"dear": 10.0})
    held = verdict_json(standing, "")["verdicts"]
    assert isinstance(held, dict)
    cheap, dear = standing.decided
    assert dear.pair_cost_usd > 4 * cheap.pair_cost_usd
    for c in (cheap, dear):
        assert c.decision is not None
        assert c.decision.next_pairs is not None
        usd = c.decision.next_pairs * c.pair_cost_usd
        assert held[c.arm]["next_cost_usd"] == pytest.approx(usd)
        assert f"({money(usd)}, about" in decision_sentence(standing)
        assert "$" not in " ".join(c.decision.reasons)


def test_next_pairs_beyond_the_budget_say_so():
    cheap = made_up({"muon": BASELINE, "k": NOISY}, price=2.8, budget_usd=0.2)
    assert "more than the $" in next_step(cheap)
    assert "of the budget of $0.20" in next_step(cheap)


def test_an_ended_plan_is_not_evidence_of_no_effect():
    standing = made_up({"muon": BASELINE, "k": NOISY}, decision={"n_max": 5})
    sentence = decision_sentence(standing)
    assert sentence.startswith("Undecided on k, keep muon")
    assert "not evidence of no effect" in sentence


def test_a_failed_guardrail_stands_beside_the_verdict():
    blocked = made_up({"muon": BASELINE, "k": STRONG}, early={"k": 0.5})
    assert verdict(blocked, "k") is Verdict.NO_GO
    sentence = decision_sentence(blocked)
    assert sentence.startswith("Archive k and keep muon")
    assert "a guardrail failed" in sentence
    assert "over the limit of 2%" in sentence
    assert "ruled out" not in sentence
    unstable = made_up({"muon": BASELINE, "k": [*STRONG[:4], "diverged"]}, decision={"n_max": 5})
    assert "as unstable" in decision_sentence(unstable)
    assert "1 of its 5 runs diverged (0 of muon's)" in decision_sentence(unstable)
    open_ = made_up({"muon": BASELINE, "k": [*NOISY[:4], "diverged"]})
    assert "and a guardrail failed: 1 of its 5 runs diverged" in decision_sentence(open_)


@pytest.mark.parametrize(
    ("orthonoise", "expected"),
    [
        (TRIVIAL, "Archive nolah and keep muon"),
        (NOISY, "Archive nolah and pivot to orthonoise, on which this study has no decision either"),
        (STRONG, "Archive nolah: "),
    ],
)
def test_the_next_method_may_be_a_challenger_of_this_study(orthonoise, expected):
    standing = made_up({"muon": BASELINE, "nolah": NOLAH, "orthonoise": orthonoise}, on_archive="orthonoise")
    sentence = decision_sentence(standing)
    assert expected.lower() in sentence.lower()
    assert sentence.count("pivot") <= 1
    if orthonoise is TRIVIAL:
        assert "The declared next method, orthonoise, is archived here as well." in next_step(standing)


def test_partial_incomplete_and_invalid_say_so_first():
    partial = made_up({"muon": BASELINE, "nolah": NOLAH, "k": [None] * 5})
    assert decision_sentence(partial).startswith(
        "Partial, 10 of 15 declared runs have an outcome (5 missing): INCOMPLETE"
    )
    assert "archive nolah" in decision_sentence(partial)
    empty = made_up({"muon": [None] * 3, "k": [None] * 3})
    assert "none of its runs has been made" in decision_sentence(empty)
    failed = made_up({"muon": ["failed"] * 3, "k": ["failed"] * 3})
    assert "6 have no outcome (6 failed)" in decision_sentence(failed)
    invalid = made_up({"muon": BASELINE, "nolah": STRONG, "k": NOISY}, unlike=["nolah"])
    assert decision_sentence(invalid).startswith("INVALID, no verdict on nolah")
    assert next_step(invalid).startswith("Mend what contradicts itself")


def test_an_invalid_study_adopts_nothing():
    standing = made_up({"muon": BASELINE, "nolah": STRONG, "k": STRONG}, findings=["the ledger lost a line"])
    assert {verdict(standing, arm) for arm in ("nolah", "k")} == {Verdict.INVALID}
    said = " ".join([headline(standing), decision_sentence(standing), next_step(standing)])
    assert not re.search(r"\badopt\b|\bGO\b", said, re.IGNORECASE)
    assert "the ledger lost a line" in decision_sentence(standing)


def test_results_reported_by_others_decide_nothing():
    standing = made_up({"muon": BASELINE[:1], "nolah": STRONG[:1]}, provenance="reported")
    assert decision_sentence(standing).startswith("Undecided on nolah: after 1 pair, reported by others")
    assert any("Reported by others" in limit for limit in limits(standing))


def test_the_report_names_the_worst_seed_of_every_challenger():
    standing = made_up({"muon": BASELINE, "k": NOISY, "l": [*STRONG[:4], "diverged"], "m": [None] * 5})
    k, unstable, empty = standing.decided
    assert worst_pair(k) == "its worst seed is 1: -0.050 nats/token against the baseline, of 5 pairs"
    assert worst_pair(unstable).startswith("its worst seed is 4, where it diverged: -3.")
    assert empty.differences == []
    text = str(build(standing, pictures=()))
    assert worst_pair(k) in text
    assert worst_pair(unstable) in text
    assert text.count("worst seed") == 2


def test_the_cost_section_has_the_difference_of_the_bills():
    standing = at_prices(made_up({"muon": BASELINE, "k": NOLAH, "l": [None] * 5}, price=2.8), {"k": 0.5})
    k, empty = standing.comparisons
    seconds = [22.5 + seed for seed in range(5)]
    saved = [s * (1 - 0.5 * (1 + 0.1 * seed)) for seed, s in enumerate(seconds)]
    assert k.seconds_difference is not None
    assert k.usd_difference is not None
    assert k.seconds_difference.mean_diff == pytest.approx(sum(saved) / 5)
    assert k.usd_difference.mean_diff == pytest.approx(sum(saved) / 5 * 2.8 / 3600)
    low, high = k.seconds_difference.ci95 or (0.0, 0.0)
    assert 0 < low < k.seconds_difference.mean_diff < high
    assert (empty.seconds_difference, empty.usd_difference) == (None, None)
    assert {"seconds_difference", "usd_difference"} <= set(empty.undefined)
    (cost,) = (s for s in build(standing, pictures=()).sections if s.title == "Cost")
    table = next(block for block in cost.blocks if hasattr(block, "rows"))
    assert [title for title, _ in table.columns][3:] == [
        "a run is cheaper by [s]", "95% interval", "a run is cheaper by [$]", "95% interval",
        "cost per percentage point of improvement",
    ]  # fmt: skip
    assert number(table.rows[0][3]) == pytest.approx(sum(saved) / 5, abs=0.1)
    assert table.rows[0][4] == bracket((low, high))
    assert table.rows[0][7] == k.estimates.usd_per_pp.sentence
    assert table.rows[1][3:7] == (ABSENT,) * 4


def test_a_study_without_a_price_has_its_costs_in_seconds():
    (free,) = made_up({"muon": BASELINE, "k": NOLAH}).comparisons
    assert free.seconds_difference is not None
    assert "s = 0" in free.seconds_difference.undefined["ci95"]
    assert free.usd_difference is None
    assert "price is 0" in free.undefined["usd_difference"]


def test_many_challengers_are_named_by_verdict():
    arms = {f"a{i}": TRIVIAL for i in range(3)} | {"bad": NOLAH}
    standing = made_up({"muon": BASELINE, **arms})
    sentence = decision_sentence(standing)
    assert "a0, a1 and a2" in sentence
    assert all(arm in headline(standing) for arm in arms)


def test_limits_name_what_the_study_is():
    assert any(
        limit.startswith("Untuned") for limit in limits(made_up({"muon": BASELINE, "k": NOLAH}, tuning="untuned"))
    )
    said = " ".join(limits(made_up({"muon": BASELINE, "k": NOLAH})))
    assert "5 pairs" in said
    assert "Skewed noise" in said
    assert "153,600 tokens" in said


@given(st.lists(st.floats(-0.3, 0.3), min_size=5, max_size=5, unique=True))
@settings(max_examples=25)
def test_the_quoted_numbers_are_those_of_the_estimates(gains):
    standing = made_up({"muon": BASELINE, "k": shifted(gains)})
    e = standing.comparisons[0].estimates
    found = re.search(
        rf"effect ({NUMBER}) nats/token, 95% interval \[({NUMBER}), ({NUMBER})\]", decision_sentence(standing)
    )
    if verdict(standing, "k") is Verdict.INVALID:
        return
    assert found
    assert e.ci95 is not None
    assert e.mean_diff is not None
    # Two significant digits of the half width, at least.
    tolerance = 0.05 * (e.ci95[1] - e.ci95[0]) / 2
    for text, value in zip(found.groups(), (e.mean_diff, *e.ci95), strict=True):
        assert abs(number(text) - value) <= tolerance


@given(st.floats(-1e12, 1e12), st.floats(1e-12, 1e12))
def test_a_difference_is_printed_to_a_tenth_of_its_uncertainty(value, scale):
    text = signed(value, scale)
    assert abs(number(text) - value) <= max(0.05 * scale, 0.006 * abs(value))
    assert not re.fullmatch(r"[+-]0\.?0*", text)


@given(st.floats(1e-12, 1e12))
def test_a_size_is_printed_to_three_digits(value):
    assert number(plain(value)) == pytest.approx(value, rel=0.0051)


def test_units_of_time_and_money():
    assert [duration(s) for s in (0.5, 25, 600, 9000)] == ["0.5 s", "25 s", "10.0 min", "2.5 h"]
    assert [money(usd) for usd in (0, 0.0041, 21, 1234.5)] == ["$0.00", "$0.0041", "$21.00", "$1,234.50"]
    assert bracket((-0.02674, -0.001178)) == "[-0.0267, -0.0012]"
    assert half_width(None, -3.0) == 3.0


def test_lost_attempts_are_not_counted_as_runs():
    lost = record("k", 0, "abandoned", attempt=0)
    standing = made_up({"muon": BASELINE, "k": NOLAH}, extra_records=[lost])
    assert standing.complete
    assert any("after a lost attempt (attempt 0 abandoned" in note for note in standing.notes)
