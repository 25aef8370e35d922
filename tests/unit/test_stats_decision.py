"""The verdict logic, clause by clause, on samples made to reach one clause each."""

import numpy as np
import pytest
from pydantic import ValidationError

from muonlab.registry.verdict import Verdict
from muonlab.stats.decision import NOT_NO_EFFECT, decide, decide_family, earliest_go, holm
from muonlab.stats.effect import describe
from muonlab.stats.evidence import critical_t
from muonlab.stats.kernel import decide_moments
from muonlab.stats.predict import DECISION_CHANCE, decision_chances, next_pairs
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Run
from muonlab.stats.threshold import t_star

NOISE = np.array([3, -2, 1, -4, 2, 4, -3, -1, 2, -2, 1, -1]) * 1e-4
BASELINE = 2.06 + np.array([2, 4, 1, 3, 2, 3, 0, 4, 2, 1, 3, 2]) * 1e-3
VOCABULARY_LOSS = float(np.log(50257))


def rule(**changes) -> Rule:
    return Rule(**({"min_effect": 0.002, "min_effect_unit": "nats", "diverged_loss": VOCABULARY_LOSS} | changes))


def sample(effect, n, noise=1.0, arm="nolah", **more) -> PairedSample:
    return PairedSample.of(arm, BASELINE[:n], BASELINE[:n] - effect - noise * NOISE[:n], **more)


def with_diverged(original, side, *seeds) -> PairedSample:
    runs = tuple(Run(seed=r.seed, status="diverged") if r.seed in seeds else r for r in getattr(original, side))
    return original.model_copy(update={side: runs})


@pytest.mark.parametrize(
    ("effect", "n", "verdict"),
    [
        (0.0040, 4, Verdict.GO),
        (0.0040, 12, Verdict.GO),
        (0.0040, 3, Verdict.INCONCLUSIVE),  # GO is blocked below 4 pairs
        (0.0010, 6, Verdict.EQUIVALENT),  # better but trivial
        (-0.0010, 6, Verdict.EQUIVALENT),  # worse but within the margin
        (-0.0040, 6, Verdict.NO_GO),
        (0.0021, 8, Verdict.GO),  # the mean is above min_effect and A holds; B cannot hold as well
        (0.0019, 8, Verdict.INCONCLUSIVE),  # better than 0 for certain, but neither at nor below min_effect
    ],
)
def test_clause(effect, n, verdict):
    assert decide(sample(effect, n), rule()).verdict is verdict


def test_no_verdict_before_n_min_even_where_the_evidence_would_do():
    lenient = {"alpha": 0.2}  # E of three pairs can reach 5
    assert decide(sample(0.004, 3), rule(**lenient)).verdict is Verdict.INCONCLUSIVE
    assert decide(sample(0.004, 3), rule(n_min=3, **lenient)).verdict is Verdict.GO


def test_reasons_of_a_go_name_its_numbers():
    decision = decide(sample(0.004, 6), rule())
    text = " ".join(decision.reasons)
    assert f"E = {decision.e_improves:.4g} >= 20" in text
    assert "95% interval" in text
    assert "n = 6" in text
    assert decision.next_pairs is None
    assert decision.undefined["next_pairs"]


def test_inconclusive_is_not_called_no_effect():
    decision = decide(sample(0.0019, 8, noise=2), rule())
    assert decision.verdict is Verdict.INCONCLUSIVE
    text = " ".join(decision.reasons)
    assert "not established" in text
    assert "no effect" not in text


def test_the_last_planned_pair_says_what_it_is_not():
    decision = decide(sample(0.0019, 12, noise=2), rule())
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.next_pairs is None
    assert any(NOT_NO_EFFECT in reason for reason in decision.reasons)


# --- the hybrid plan


def at_t(t, n, margin_sd=0.0):
    """A sample whose paired t against 0 is t, with sd 0.001."""
    x = NOISE[:n] - NOISE[:n].mean()
    x = 0.001 * x / x.std(ddof=1)
    return PairedSample.of("nolah", BASELINE[:n], BASELINE[:n] - x - t * 0.001 / np.sqrt(n))


def test_t_star_counts_at_the_last_pair_only_and_not_in_an_amended_plan():
    tiny = {"min_effect": 1e-6}
    above, below = at_t(1.935, 12), at_t(1.925, 12)
    assert decide(above, rule(**tiny)).verdict is Verdict.GO
    assert decide(below, rule(**tiny)).verdict is Verdict.INCONCLUSIVE
    assert decide(above, rule(n_max=13, **tiny)).verdict is Verdict.INCONCLUSIVE
    amended = decide(above, rule(amended=True, **tiny))
    assert amended.verdict is Verdict.INCONCLUSIVE
    assert any("plan amended" in reason for reason in amended.reasons)


def test_t_star_is_named_where_it_decides():
    decision = decide(at_t(1.935, 12), rule(min_effect=1e-6))
    assert any("reaches t* at the last planned pair" in reason for reason in decision.reasons)


def test_a_fixed_plan_looks_once():
    fixed = rule(plan="fixed", fixed_n=8, min_effect=1e-6)
    assert decide(at_t(1.90, 8), fixed).verdict is Verdict.GO  # t_{.95, 7} = 1.895
    assert decide(at_t(1.89, 8), fixed).verdict is Verdict.INCONCLUSIVE
    early = decide(at_t(9.0, 7), fixed)
    assert early.verdict is Verdict.INCOMPLETE
    assert "8 pairs" in early.reasons[0]
    at_hand = rule(plan="fixed", fixed_n="at_hand", min_effect=1e-6)
    assert decide(at_t(9.0, 7), at_hand).verdict is Verdict.GO


def test_an_amended_fixed_plan_keeps_only_the_e_process():
    fixed = rule(plan="fixed", fixed_n=8, min_effect=1e-6, amended=True)
    assert decide(at_t(2.5, 8), fixed).verdict is Verdict.INCONCLUSIVE
    assert decide(at_t(5.0, 8), fixed).verdict is Verdict.GO


def test_the_shipped_t_star_serves_its_own_settings_only():
    assert t_star(12, 0.05 / 3, n_min=4, g=2.0) == 2.5325
    later = t_star(12, 0.05, n_min=10, g=2.0)
    # Fewer interim looks leave more level for the last: t* falls towards t_{.95, 11} = 1.796.
    assert 1.796 < later < t_star(12, 0.05, n_min=4, g=2.0) - 0.02


def test_a_caller_keeps_simulated_t_star():
    cache: dict[str, float] = {}
    value = t_star(6, 0.01, n_min=4, g=1.5, cache=cache)
    assert list(cache.values()) == [value]
    key = next(iter(cache))
    assert t_star(6, 0.01, n_min=4, g=1.5, cache={key: value + 0.001}) == value + 0.001


# --- guardrails and divergence


def test_a_go_but_for_early_regress_is_no_go_and_says_so():
    decision = decide(sample(0.004, 6, early_regress=0.0938), rule())
    assert decision.verdict is Verdict.NO_GO
    assert any("9.38%" in reason and "guardrail" in reason for reason in decision.reasons)
    assert decide(sample(0.004, 6, early_regress=0.02), rule()).verdict is Verdict.GO


def test_an_unchecked_guardrail_is_said():
    assert any("not checked" in reason for reason in decide(sample(0.004, 6), rule()).reasons)


def test_a_diverged_run_counts_with_the_vocabulary_loss():
    e = describe(with_diverged(sample(0.004, 5), "challenger", 2), rule())
    assert e.challenger_diverged == 1
    assert e.mean_diff == pytest.approx(
        (sample_mean(0.004, [0, 1, 3, 4]) * 4 + BASELINE[2] - VOCABULARY_LOSS) / 5, rel=1e-12
    )


def sample_mean(effect, seeds):
    return effect + NOISE[seeds].mean()


def test_both_diverged_is_a_difference_of_zero():
    both = with_diverged(with_diverged(sample(0.004, 5), "challenger", 2), "baseline", 2)
    assert describe(both, rule()).mean_diff == pytest.approx(sample_mean(0.004, [0, 1, 3, 4]) * 4 / 5, rel=1e-12)


def test_a_would_be_go_with_a_divergence_in_both_arms_is_no_go():
    both = with_diverged(with_diverged(sample(0.004, 10, noise=0.5), "challenger", 2), "baseline", 2)
    decision = decide(both, rule())
    assert decision.verdict is Verdict.NO_GO
    assert any("1 of 10 challenger runs diverged" in reason for reason in decision.reasons)


def test_more_divergences_than_the_baseline_at_the_end_is_no_go():
    diverged = with_diverged(sample(0.004, 12), "challenger", 2)
    assert decide(diverged, rule()).verdict is Verdict.NO_GO
    assert "instability" in decide(diverged, rule()).reasons[1]
    assert decide(with_diverged(sample(0.004, 11), "challenger", 2), rule()).verdict is Verdict.INCONCLUSIVE


def test_a_divergence_without_a_declared_loss_is_refused():
    with pytest.raises(ValueError, match=r"arm 'nolah', seed 2: .*diverged_loss"):
        decide(with_diverged(sample(0.004, 5), "challenger", 2), rule(diverged_loss=None))


def test_a_percentage_margin_ignores_the_baselines_divergence():
    percent = {"min_effect": 0.5, "min_effect_unit": "percent"}
    diverged = with_diverged(sample(0.004, 5), "baseline", 2)
    assert describe(diverged, rule(**percent)).margin == pytest.approx(0.005 * BASELINE[[0, 1, 3, 4]].mean())


# --- integrity


@pytest.mark.parametrize("effect", [0.0, 0.004, -0.004])
def test_no_spread_is_suspect(effect):
    decision = decide(sample(effect, 5, noise=0), rule())
    assert decision.verdict is Verdict.INVALID
    assert "suspect" in decision.reasons[0]


def test_no_spread_but_float_subtraction_is_suspect():
    baseline, challenger = [2.1, 2.2, 2.3, 2.4, 2.5], [2.0, 2.1, 2.2, 2.3, 2.4]
    assert len({b - c for b, c in zip(baseline, challenger, strict=True)}) > 1  # all 0.1 on paper
    assert decide(PairedSample.of("nolah", baseline, challenger), rule()).verdict is Verdict.INVALID


def test_one_identical_pair_is_suspect():
    assert decide(sample(0.0, 1, noise=0), rule()).verdict is Verdict.INVALID


def test_an_integrity_failure_of_the_caller_is_invalid():
    broken = sample(0.004, 6).model_copy(update={"integrity_failures": ("seed 3: data digests differ",)})
    decision = decide(broken, rule())
    assert decision.verdict is Verdict.INVALID
    assert decision.reasons[0] == "seed 3: data digests differ"


def test_reported_results_say_what_they_would_be():
    decision = decide(sample(0.004, 6, provenance="reported"), rule(price_per_pair_usd=7))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert (decision.next_pairs, decision.next_cost_usd) == (4, 28)
    assert any("capped at INCONCLUSIVE (uncapped: GO)" in reason for reason in decision.reasons)


# --- the family


def test_step_down_frees_level_for_the_rest():
    strong, weak = sample(0.004, 6, arm="strong"), at_evidence(50, 6, "weak")
    loose = rule(min_effect=1e-6)
    hopeless = sample(-0.004, 6, arm="hopeless")
    by_arm = {d.arm: d for d in decide_family([weak, strong, hopeless], loose)}
    assert by_arm["strong"].verdict is Verdict.GO
    assert by_arm["strong"].level_improves == pytest.approx(0.05 / 3)
    assert by_arm["weak"].verdict is Verdict.GO  # 50 is below 60, but at least 40 once strong is rejected
    assert by_arm["weak"].level_improves == pytest.approx(0.05 / 2)
    assert by_arm["hopeless"].level_improves == pytest.approx(0.05)
    alone_in_company = decide_family([weak, hopeless, sample(-0.004, 6, arm="worse")], loose)
    assert alone_in_company[0].verdict is Verdict.INCONCLUSIVE


def at_evidence(e_value, n, arm):
    """A sample whose E against 0 is about e_value."""
    return at_t(critical_t(n, 1 / e_value, 2.0), n).model_copy(update={"arm": arm})


def test_an_unusable_arm_stays_in_the_family():
    gap = PairedSample(
        arm="gap",
        baseline=tuple(Run(seed=i, loss=float(BASELINE[i])) for i in range(6)),
        challenger=tuple(Run(seed=i, loss=float(BASELINE[i] - 0.004 + NOISE[i])) for i in (0, 1, 2, 3, 5)),
    )
    weak = at_evidence(30, 6, "weak")
    loose = rule(min_effect=1e-6)
    assert decide(weak, loose).verdict is Verdict.GO
    first, second = decide_family([weak, gap], loose)
    assert first.verdict is Verdict.INCONCLUSIVE  # 30 is below 40
    assert second.verdict is Verdict.INCOMPLETE
    assert second.undefined["e_improves"]
    assert second.undefined["p_adjusted"]  # its p would not be that of a test the plan allows
    assert first.p_adjusted == pytest.approx(2 * describe(weak, loose).p_one_sided)


@pytest.mark.parametrize("arms", [[], ["a", "a"]])
def test_an_empty_family_or_a_repeated_arm_is_refused(arms):
    with pytest.raises(ValueError, match="at least one challenger, each once"):
        decide_family([sample(0.004, 5, arm=arm) for arm in arms], rule())


def test_holm_keeps_undefined_p_in_the_count():
    assert holm([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]


def test_undeclared_arms_count_and_are_never_rejected():
    strong, weak = sample(0.004, 6, arm="strong"), at_evidence(30, 6, "weak")
    loose = rule(min_effect=1e-6)
    assert decide(weak, loose).verdict is Verdict.GO
    (picked,) = decide_family([weak], loose, undeclared=1)
    assert picked.verdict is Verdict.INCONCLUSIVE  # 30 is below 40
    assert (picked.family_size, picked.level_improves) == (2, 0.025)
    assert picked.p_adjusted == pytest.approx(2 * describe(weak, loose).p_one_sided)
    assert any("the family is taken as 2: 1 arm that is not declared" in reason for reason in picked.reasons)
    # Rejecting one frees level for the rest, but never more than the undeclared leave.
    second = decide_family([strong, weak], loose, undeclared=6)[1]
    assert second.level_improves == pytest.approx(0.05 / 7)


# --- Dunnett, where it is declared

FAMILY = {
    "nolah": [602, 637, 575, 624, 609],
    "second": [590, 601, 588, 602, 581],
    "third": [630, 633, 617, 641, 611],
}
"""Losses are 2 + x 1e-4; the protocol's worked family, with the baseline below."""
FAMILY_BASELINE = 2 + np.array([623, 641, 610, 635, 618]) * 1e-4


def family(**changes) -> list[PairedSample]:
    return [
        PairedSample.of(arm, FAMILY_BASELINE, 2 + np.array(x) * 1e-4).model_copy(update=changes.get(arm, {}))
        for arm, x in FAMILY.items()
    ]


def dunnett(**changes) -> Rule:
    return rule(**({"plan": "fixed", "fixed_n": 5, "correction": "dunnett", "min_effect": 0.001} | changes))


def test_dunnett_decides_by_the_protocols_adjusted_p():
    decisions = decide_family(family(), dunnett())
    assert [d.p_adjusted for d in decisions] == pytest.approx([0.0211448, 0.0001304, 0.8075], rel=3e-4)
    assert [d.verdict for d in decisions] == [Verdict.GO, Verdict.GO, Verdict.INCONCLUSIVE]
    assert [d.correction for d in decisions] == ["dunnett"] * 3
    assert any("Dunnett's p = 0.02114 <= 0.05" in reason for reason in decisions[0].reasons)
    assert any("assumes that the noise of all arms is equal" in reason for reason in decisions[0].reasons)
    # At a stricter alpha the first is not established, as its p says.
    assert decide_family(family(), dunnett(alpha=0.02))[0].verdict is Verdict.INCONCLUSIVE


def test_dunnett_shifts_the_losses_by_the_margin_for_b_and_c():
    margin = 0.05  # far above every difference: all are within it
    assert {d.verdict for d in decide_family(family(), dunnett(min_effect=margin))} == {Verdict.EQUIVALENT}
    worse = [
        s.model_copy(
            update={"challenger": tuple(r.model_copy(update={"loss": r.loss + 2 * margin}) for r in s.challenger)}
        )
        for s in family()
    ]
    assert {d.verdict for d in decide_family(worse, dunnett(min_effect=margin))} == {Verdict.NO_GO}


def test_dunnett_of_one_challenger_is_the_paired_t():
    (one,) = decide_family(family()[:1], dunnett())
    assert one.p_adjusted == pytest.approx(describe(family()[0], dunnett()).p_one_sided, rel=1e-6)
    assert decide_family(family()[:1], dunnett(), undeclared=2)[0].p_adjusted > one.p_adjusted


def test_dunnett_needs_complete_blocks():
    short = family()[1].baseline[:4], family()[1].challenger[:4]
    other = {"second": {"baseline": short[0], "challenger": short[1]}}
    decisions = decide_family(family(**other), dunnett(fixed_n="at_hand"))
    assert {d.verdict for d in decisions} == {Verdict.INVALID}
    assert "the arms' seeds differ (nolah: 0, 1, 2, 3, 4; second: 0, 1, 2, 3;" in decisions[0].reasons[0]
    waiting = decide_family(family(second={"missing_cells": ("cell second-4 is missing",)}), dunnett())
    assert {d.verdict for d in waiting} == {Verdict.INCOMPLETE}
    assert waiting[0].reasons[0].endswith("pools the spread of all arms, and second is INCOMPLETE")
    assert waiting[0].p_adjusted is None
    broken = decide_family(family(second={"integrity_failures": ("edited",)}), dunnett())
    assert {d.verdict for d in broken} == {Verdict.INVALID}
    assert broken[1].reasons[0] == "edited"


def test_an_amended_plan_does_not_use_dunnett():
    ours, theirs = (decide_family(family(), dunnett(amended=True, correction=c)) for c in ("dunnett", "holm"))
    assert [d.verdict for d in ours] == [d.verdict for d in theirs]
    assert [d.p_adjusted for d in ours] == [d.p_adjusted for d in theirs]
    assert {d.correction for d in ours} == {"holm"}
    assert any("Dunnett's test, declared for one look, is replaced" in reason for reason in ours[0].reasons)


# --- what to do next


def test_one_pair_asks_for_the_earliest_go():
    decision = decide(sample(0.004, 1), rule(price_per_pair_usd=7))
    assert (decision.verdict, decision.next_pairs, decision.next_cost_usd) == (Verdict.INCONCLUSIVE, 3, 21)
    assert "the earliest GO is at 4 pairs: the next 3 pairs" in decision.reasons


@pytest.mark.parametrize(("n", "more"), [(1, {}), (8, {"noise": 2}), (8, {"provenance": "reported", "noise": 0.1})])
def test_reasons_do_not_depend_on_the_price(n, more):
    free, dear = (decide(sample(0.0019, n, **more), rule(price_per_pair_usd=usd)) for usd in (0, 7))
    assert dear.next_cost_usd == 7 * dear.next_pairs > free.next_cost_usd
    assert dear.reasons == free.reasons


@pytest.mark.parametrize(
    ("changes", "level", "earliest"),
    [
        ({}, 0.05, 4),
        ({}, 0.05 / 3, 5),
        ({"n_min": 6}, 0.05, 6),
        ({"n_max": 4, "g": 0.1}, 0.05, 4),  # out of reach for E: only t* can, at the last pair
        ({"n_max": 4, "g": 0.1, "amended": True}, 0.05, None),
        ({"plan": "fixed", "fixed_n": 9}, 0.05, 9),
    ],
)
def test_earliest_go(changes, level, earliest):
    assert earliest_go(rule(**changes), level) == earliest


def test_next_pairs_is_the_smallest_that_is_likely_enough():
    assert next_pairs([0.1, 0.5, 0.8, 0.9]) == 3
    assert next_pairs([0.1, 0.2, 0.3]) == 3


def test_predictive_chances_rise_and_repeat():
    arguments = (5, 0.0016, 4 * 0.0012**2, 0.001, rule(), (0.05, 0.05, 0.05))
    chances = decision_chances(*arguments)
    assert len(chances) == 7
    assert chances == sorted(chances)
    assert chances == decision_chances(*arguments)


@pytest.mark.parametrize(("n", "effect", "sd"), [(2, 0.0016, 0.0012), (5, 0.0016, 0.0012), (8, 0.0010, 0.0015)])
def test_predictive_chances_second_route(n, effect, sd):
    """One pair at a time: the next difference is mean + s sqrt(1 + 1/n) t_{n-1}, then mean, s and n are updated."""
    studies, margin, four_more = 50_000, 0.001, rule(min_effect=0.001, n_max=n + 4)
    chances = decision_chances(n, effect, (n - 1) * sd**2, margin, four_more, (0.05, 0.05, 0.05))
    rng = np.random.default_rng(0)
    mean, ss, decided = np.full((studies, 1), effect), np.full((studies, 1), (n - 1) * sd**2), False
    for k in range(1, 5):
        m = n + k - 1
        new = mean + np.sqrt(ss / (m - 1) * (1 + 1 / m)) * rng.standard_t(m - 1, size=(studies, 1))
        ss = ss + (new - mean) ** 2 * m / (m + 1)
        mean = (m * mean + new) / (m + 1)
        verdict = decide_moments(m + 1, mean, ss, margin, four_more, family_size=1).verdict
        decided = decided | (verdict != Verdict.INCONCLUSIVE)
        assert chances[k - 1] == pytest.approx(decided.mean(), abs=4 * np.sqrt(0.25 / 4000))
    assert 0.05 < chances[-1] < 0.95


def test_the_chance_reached_is_the_declared_one():
    decision = decide(sample(0.0016, 5, noise=5), rule(min_effect=0.001))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.decision_chance >= DECISION_CHANCE or decision.next_pairs == 12 - 5


# --- the rule


@pytest.mark.parametrize(
    "changes",
    [
        {"min_effect": 0},
        {"min_effect": float("nan")},
        {"alpha": 0.5},
        {"n_min": 5, "n_max": 4},
        {"plan": "fixed"},
        {"fixed_n": 8},
        {"plan": "fixed", "fixed_n": 3},
        {"correction": "dunnett"},
        {"unknown": 1},
    ],
)
def test_an_inconsistent_rule_cannot_be_built(changes):
    with pytest.raises(ValidationError):
        rule(**changes)
