"""Laws of the decision procedure, over generated samples.

Losses are multiples of 2^-12 near 2 and factors are powers of two, so that sums are exact in float64 and
equal means equal, not close.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.registry.verdict import Verdict
from muonlab.stats.decision import Decision, decide, decide_family
from muonlab.stats.effect import describe, evidence_path
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Run

GRID = 2.0**-12
DIVERGED_LOSS = 10.0
EXAMPLES = settings(max_examples=60, deadline=None)


def loss(steps: int) -> float:
    return 2 + steps * GRID


SHIFTS = st.integers(-40, 40)


@st.composite
def samples(draw, n_min=1, n_max=8, shifts=SHIFTS):
    """Baselines with a spread of their own; challengers that are better, equal or worse by up to a few
    spreads."""
    n = draw(st.integers(n_min, n_max))
    baseline = draw(st.lists(st.integers(-40, 40), min_size=n, max_size=n))
    shift = draw(shifts)
    noise = draw(st.lists(st.integers(-8, 8), min_size=n, max_size=n))
    challenger = [b - shift - e for b, e in zip(baseline, noise, strict=True)]
    return [loss(b) for b in baseline], [loss(c) for c in challenger]


def rule(min_effect_steps=10, **changes) -> Rule:
    values = {
        "min_effect": min_effect_steps * GRID,
        "min_effect_unit": "nats",
        "n_max": 8,
        "diverged_loss": DIVERGED_LOSS,
        "price_per_pair_usd": 7.0,
    }
    return Rule(**(values | changes))


def comparable(decision: Decision) -> dict:
    """What must not change under a change of units: everything but the sentences, which print the units."""
    return decision.model_dump(exclude={"reasons"})


margins = st.integers(1, 40)


@EXAMPLES
@given(samples())
def test_swapping_the_arms_flips_the_sign(sample):
    here, there = (
        describe(PairedSample.of("arm", *order), rule(diverged_loss=None)) for order in (sample, sample[::-1])
    )
    assert there.mean_diff == -here.mean_diff
    if here.t is not None:
        assert there.t == pytest.approx(-here.t, rel=1e-12)
        assert there.d_z == pytest.approx(-here.d_z, rel=1e-12)
        assert there.ci95 == pytest.approx((-here.ci95[1], -here.ci95[0]), rel=1e-9, abs=1e-15)
        assert there.p_one_sided == pytest.approx(1 - here.p_one_sided, abs=1e-9)
        assert there.p_two_sided == pytest.approx(here.p_two_sided, rel=1e-9)
        assert there.tost_p == pytest.approx(here.tost_p, rel=1e-9)
    if here.mean_diff > 0:
        assert there.e_value < here.e_value


@EXAMPLES
@given(samples(), st.integers(-500, 4000), margins)
def test_a_common_constant_changes_nothing(sample, constant, margin):
    shifted = tuple([x + constant * GRID for x in arm] for arm in sample)
    here, there = (decide(PairedSample.of("arm", *arms), rule(margin)) for arms in (sample, shifted))
    assert comparable(here) == comparable(there)


@EXAMPLES
@given(samples(), st.integers(-3, 3), margins)
def test_scaling_losses_and_min_effect_together_changes_nothing(sample, exponent, margin):
    factor = 2.0**exponent
    scaled = tuple([x * factor for x in arm] for arm in sample)
    here = decide(PairedSample.of("arm", *sample), rule(margin))
    there = decide(PairedSample.of("arm", *scaled), rule(margin * factor))
    assert comparable(here) == comparable(there)


@EXAMPLES
@given(samples(n_min=4), margins, st.randoms(use_true_random=False))
def test_the_order_of_pairs_changes_nothing_in_a_fixed_look(sample, margin, random):
    order = list(range(len(sample[0])))
    random.shuffle(order)
    shuffled = tuple([arm[i] for i in order] for arm in sample)
    fixed = rule(margin, plan="fixed", fixed_n=len(order))
    here, there = (decide(PairedSample.of("arm", *arms), fixed) for arms in (sample, shuffled))
    assert comparable(here) == comparable(there)


@EXAMPLES
@given(samples(n_min=2), margins, st.data())
def test_a_diverged_challenger_is_never_go(sample, margin, data):
    at = data.draw(st.sets(st.integers(0, len(sample[0]) - 1), min_size=1))
    both = data.draw(st.booleans())
    paired = PairedSample(
        arm="arm",
        baseline=tuple(
            Run(seed=i, loss=x, status="diverged" if both and i in at else "completed") for i, x in enumerate(sample[0])
        ),
        challenger=tuple(
            Run(seed=i, loss=x, status="diverged" if i in at else "completed") for i, x in enumerate(sample[1])
        ),
    )
    assert decide(paired, rule(margin)).verdict is not Verdict.GO


@EXAMPLES
@given(samples(n_min=2), st.data())
def test_a_diverged_challenger_lowers_the_mean(sample, data):
    at = data.draw(st.integers(0, len(sample[0]) - 1))
    whole = PairedSample.of("arm", *sample)
    broken = whole.model_copy(
        update={
            "challenger": tuple(
                Run(seed=run.seed, status="diverged") if run.seed == at else run for run in whole.challenger
            )
        }
    )
    assert describe(broken, rule()).mean_diff < describe(whole, rule()).mean_diff


@EXAMPLES
@given(samples(n_min=4, n_max=7, shifts=st.integers(-40, -10)), margins)
def test_adding_an_identical_pair_never_turns_no_go_into_go(sample, margin):
    extended = tuple([*arm, loss(0)] for arm in sample)
    before, after = (decide(PairedSample.of("arm", *arms), rule(margin)).verdict for arms in (sample, extended))
    assert not (before is Verdict.NO_GO and after is Verdict.GO)


@EXAMPLES
@given(samples(n_min=4, n_max=7), st.integers(1, 40), st.data())
def test_a_copy_of_a_pair_never_turns_no_go_into_go(sample, margin, data):
    at = data.draw(st.integers(0, len(sample[0]) - 1))
    extended = tuple([*arm, arm[at]] for arm in sample)
    before, after = (decide(PairedSample.of("arm", *arms), rule(margin)).verdict for arms in (sample, extended))
    assert not (before is Verdict.NO_GO and after is Verdict.GO)


@EXAMPLES
@given(samples(n_min=4, shifts=st.integers(0, 60)), margins, st.data())
def test_a_diverged_challenger_only_lowers_the_evidence_of_improvement(sample, margin, data):
    at = data.draw(st.integers(0, len(sample[0]) - 1))
    whole = PairedSample.of("arm", *sample)
    runs = tuple(Run(seed=run.seed, status="diverged") if run.seed == at else run for run in whole.challenger)
    before, after = (decide(arms, rule(margin)) for arms in (whole, whole.model_copy(update={"challenger": runs})))
    assert after.verdict is not Verdict.GO
    if before.e_improves is not None and before.e_improves > 1:
        assert after.e_improves < before.e_improves


@EXAMPLES
@given(samples(), margins)
def test_reported_results_are_capped(sample, margin):
    verdict = decide(PairedSample.of("arm", *sample, provenance="reported"), rule(margin)).verdict
    assert verdict in {Verdict.INCONCLUSIVE, Verdict.INVALID, Verdict.INCOMPLETE}


@EXAMPLES
@given(samples(), margins, st.floats(0, 0.2))
def test_a_broken_guardrail_never_makes_go_and_changes_only_go(sample, margin, regress):
    paired = PairedSample.of("arm", *sample)
    before = decide(paired, rule(margin)).verdict
    after = decide(paired.model_copy(update={"early_regress": regress}), rule(margin)).verdict
    expected = Verdict.NO_GO if before is Verdict.GO and regress > 0.02 else before
    assert after is expected


@EXAMPLES
@given(samples(n_min=4), st.integers(1, 3), margins)
def test_companions_never_help_an_arm_to_go(sample, companions, margin):
    """Holm: a larger family raises every threshold, whatever the other arms do."""
    paired = PairedSample.of("arm", *sample)
    dull = [
        PairedSample.of(f"dull{k}", sample[0], [x + (-1) ** i * GRID for i, x in enumerate(sample[0])])
        for k in range(companions)
    ]
    alone = decide(paired, rule(margin)).verdict
    together = decide_family([paired, *dull], rule(margin))[0].verdict
    if together in {Verdict.GO, Verdict.EQUIVALENT}:
        assert alone is together
    if alone is Verdict.INCONCLUSIVE:
        assert together is Verdict.INCONCLUSIVE


@EXAMPLES
@given(samples(), margins)
def test_every_result_is_json_with_a_reason_for_each_null(sample, margin):
    paired = PairedSample.of("arm", *sample)
    for result in (decide(paired, rule(margin)), describe(paired, rule(margin))):
        document = json.loads(json.dumps(result.model_dump(mode="json"), allow_nan=False))
        nulls = {name for name, value in document.items() if value is None}
        assert nulls == set(document["undefined"])
        assert all(document["undefined"].values())


@EXAMPLES
@given(samples())
def test_the_evidence_path_below_the_margin_ends_where_the_decision_does(sample):
    for declared in (rule(), rule(min_effect=0.5, min_effect_unit="percent")):
        paired = PairedSample.of("arm", *sample)
        path = evidence_path(paired, declared, "below_margin")
        decision = decide(paired, declared)
        if decision.e_below_margin is not None:
            assert path[-1] == (len(sample[0]), decision.e_below_margin)
        shorter = PairedSample.of("arm", sample[0][:-1], sample[1][:-1])
        assert evidence_path(shorter, declared, "below_margin") == path[:-1]


@EXAMPLES
@given(samples())
def test_the_evidence_path_is_what_each_look_saw(sample):
    path = evidence_path(PairedSample.of("arm", *sample), rule())
    assert [n for n, _ in path] == list(range(1, len(sample[0]) + 1))
    for n, e_value in path:
        assert describe(PairedSample.of("arm", sample[0][:n], sample[1][:n]), rule()).e_value == e_value
    assert np.all([e_value > 0 for _, e_value in path])
