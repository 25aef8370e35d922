"""What is compared with what: families, races to a target, runs that never arrive, prices, what is never claimed."""

import math
from pathlib import Path

import numpy as np
import pytest

from muonlab.analysis.compare import Question, compare, exit_code
from muonlab.analysis.table import read_results
from muonlab.registry.errors import UsageError
from muonlab.registry.verdict import Verdict
from muonlab.stats.decision import decide_family
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample
from muonlab.stats.unpaired import UnpairedSample, decide_unpaired

FIXED = {"plan": "fixed", "fixed_n": "at_hand"}
STEPS = np.array([50, 100, 150, 200])
SLOW, FAST = np.array([2.60, 2.40, 2.30, 2.24]), np.array([2.60, 2.35, 2.26, 2.20])


@pytest.fixture
def table(tmp_path: Path):
    def table(arms, *, diverged_loss=None, extra=""):
        """arms: for each, losses by seed, or curves [seeds, E] over STEPS; None is a seed that was not run."""
        lines = []
        for arm, runs in arms.items():
            for seed, run in enumerate(runs):
                for step, loss in zip(STEPS, np.atleast_1d(run), strict=False) if run is not None else ():
                    at = f",{step}" if np.ndim(run) else ""
                    lines.append(f"{arm},{seed}{at},{loss:.9g}")
        curves = any(np.ndim(run) for runs in arms.values() for run in runs)
        path = tmp_path / "results.csv"
        path.write_text("\n".join([f"arm,seed{',step' if curves else ''},loss", *lines]) + "\n" + extra)
        return read_results(path, diverged_loss=diverged_loss)

    return table


def ask(results, *, effect=0.5, unit="percent", rule=None, **given):
    declared = Rule(min_effect=effect, min_effect_unit=unit, **(rule or {}))
    return compare(results, Question(baseline="muon", rule=declared, **given))


def noisy(curve, n=6, sd=0.002, seed=0):
    rng = np.random.default_rng(seed)
    return [curve + sd * rng.standard_normal() + sd / 10 * rng.standard_normal(curve.size) for _ in range(n)]


def losses(mean, n=6, sd=0.002, seed=0):
    return list(np.round(mean + sd * np.random.default_rng(seed).standard_normal(n), 6))


FAMILY = {"muon": losses(2.0), "a": losses(1.999, seed=1), "b": losses(1.99, seed=2), "c": losses(2.02, seed=3)}


@pytest.mark.parametrize("unpaired", [False, True])
def test_picking_one_arm_to_print_does_not_shrink_the_family(table, unpaired):
    results = table(FAMILY)
    given = {"rule": FIXED, "unpaired": unpaired}
    everything = {c.arm: c for c in ask(results, **given).comparisons}
    (picked,) = ask(results, printed=("b",), **given).comparisons
    (narrowed,) = ask(results, printed=("b",), family=("b",), **given).comparisons
    assert picked == everything["b"]
    assert (picked.family_size, narrowed.family_size) == (3, 1)
    assert narrowed.p_adjusted == narrowed.p_one_sided < picked.p_adjusted


def test_paired_losses_are_decided_by_the_family_rule(table):
    rule = Rule(min_effect=0.5, min_effect_unit="percent")
    samples = [PairedSample.of(arm, FAMILY["muon"], FAMILY[arm]) for arm in "abc"]
    found = ask(table(FAMILY)).comparisons
    for ours, theirs in zip(found, decide_family(samples, rule), strict=True):
        assert (ours.arm, ours.verdict, ours.reasons) == (theirs.arm, theirs.verdict, theirs.reasons)


def test_unpaired_losses_are_decided_by_welch_on_all_runs(table):
    arms = {"muon": losses(2.0, 8), "a": [None] * 8 + losses(1.98, 5, seed=4)}
    (found,) = ask(table(arms), rule=FIXED, unpaired=True).comparisons
    sample = UnpairedSample(
        arm="a",
        baseline=tuple(arms["muon"]),
        challenger=tuple(arms["a"][8:]),
        outcome="loss",
        margin=0.005 * float(np.mean(arms["muon"])),
    )
    theirs = decide_unpaired([sample], Rule(min_effect=0.5, min_effect_unit="percent", **FIXED))[0]
    assert found.unpaired.p_improves == pytest.approx(theirs.p_improves)
    assert found.verdict is theirs.verdict is Verdict.GO
    assert (found.n, found.n_baseline, found.n_challenger) == (None, 8, 5)
    with pytest.raises(UsageError, match=r"share no seed.*--unpaired"):
        ask(table(arms))


@pytest.mark.parametrize(
    ("target", "baseline", "challenger"), [(2.30, 150, 127.778), (2.24, 200, 166.667), (2.22, math.inf, 183.333)]
)
def test_race_of_the_protocols_speed_example(table, target, baseline, challenger):
    results = table({"muon": [SLOW], "nolah": [np.array([2.70, 2.35, 2.26, 2.20])]})
    report = ask(results, effect=1, target=target)
    (speed,) = [c.speed for c in report.comparisons]
    if math.isinf(baseline):
        assert (speed.baseline_never, speed.challenger_never) == (1, 0)
    else:
        assert speed.geometric_mean_ratio == pytest.approx(baseline / challenger, rel=1e-5)
    ours, theirs = report.steps_to_target
    assert ours.median.median == (None if math.isinf(baseline) else pytest.approx(baseline))
    assert theirs.median.median == pytest.approx(challenger, rel=1e-5)


def test_paired_race_is_a_paired_t_of_log_steps(table):
    results = table({"muon": noisy(SLOW), "nolah": noisy(FAST, seed=1)})
    (found,) = ask(results, effect=2, target=2.30, rule=FIXED).comparisons
    speed = found.speed
    assert found.unit == "log steps"
    assert found.p_one_sided == pytest.approx(speed.p_one_sided)
    assert math.exp(found.mean_diff) == pytest.approx(speed.geometric_mean_ratio)
    assert np.exp(found.ci95) == pytest.approx(speed.ratio_ci95)
    assert found.rel_diff_pct == pytest.approx(speed.steps_saved_pct)
    assert found.rel_ci95_pct == pytest.approx([100 * (1 - 1 / ratio) for ratio in speed.ratio_ci95])
    assert found.margin == pytest.approx(-math.log(0.98))
    assert found.verdict is Verdict.GO
    assert "fewer steps to 2.3" in found.reasons[0]
    assert "nats" not in " ".join(found.reasons)


def test_paired_race_with_runs_that_never_arrive(table):
    results = table({"muon": [*noisy(SLOW, 5), SLOW + 0.2], "nolah": noisy(FAST, seed=1)})
    fixed = ask(results, effect=2, target=2.30, rule=FIXED).comparisons[0]
    assert (fixed.speed.baseline_never, fixed.mean_diff) == (1, None)
    assert fixed.p_one_sided == fixed.p_adjusted == 2.0**-6
    assert fixed.verdict is Verdict.GO
    of_two = table({"muon": [*noisy(SLOW, 5), SLOW + 0.2], "nolah": noisy(FAST, seed=1), "b": noisy(FAST, seed=2)})
    assert [c.p_adjusted for c in ask(of_two, effect=2, target=2.30, rule=FIXED).comparisons] == [2.0**-5] * 2
    looking = ask(results, effect=2, target=2.30).comparisons[0]
    assert looking.verdict is Verdict.INCONCLUSIVE
    assert any("--plan fixed" in reason for reason in looking.reasons)


def test_a_pair_in_which_neither_run_arrives_counts_against_every_claim(table):
    both = {"muon": [*noisy(SLOW, 5), SLOW + 0.2], "nolah": [*noisy(FAST, 5, seed=1), FAST + 0.2]}
    found = ask(table(both), effect=2, target=2.30, rule=FIXED).comparisons[0]
    assert found.p_adjusted == 7 / 64  # five of six signs, not five of five
    assert found.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("unpaired", [False, True])
def test_a_baseline_that_was_stopped_early_is_not_slower(table, unpaired):
    short = [curve[:2] for curve in noisy(SLOW, 8)]
    report = ask(
        table({"muon": short, "nolah": noisy(SLOW, 8, seed=1)}), effect=1, target=2.31, rule=FIXED, unpaired=unpaired
    )
    (found,) = report.comparisons
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.p_adjusted == 1
    assert any("had ended" in reason for reason in found.reasons)
    assert "100 to 200" in report.notes[-1]


def test_a_diverged_run_never_arrives_even_if_it_had(table):
    broken = np.array([2.60, 2.20, np.nan, np.nan])
    arms = {"muon": noisy(SLOW), "nolah": [*noisy(FAST, 5, seed=1), broken]}
    results = table(arms, diverged_loss=7.6)
    for unpaired in (False, True):
        report = ask(results, effect=2, target=2.30, rule=FIXED | {"diverged_loss": 7.6}, unpaired=unpaired)
        assert report.steps_to_target[1].never_seeds == (5,)
        assert report.comparisons[0].verdict is Verdict.NO_GO
    turned = table({"muon": arms["nolah"], "nolah": noisy(FAST, seed=2)}, diverged_loss=7.6)
    for raced, never in ((results, (0, 1)), (turned, (1, 0))):
        speed = ask(raced, effect=2, target=2.30, rule=FIXED | {"diverged_loss": 7.6}).comparisons[0].speed
        assert (speed.baseline_never, speed.challenger_never) == never


def test_final_losses_after_unequal_lengths_are_not_compared(table):
    arms = {"muon": noisy(SLOW), "nolah": [curve[:3] for curve in noisy(FAST, seed=1)]}
    for unpaired, words in ((False, "ends at step 200"), (True, "--target")):
        report = ask(table(arms), rule=FIXED, unpaired=unpaired)
        assert report.comparisons[0].verdict is Verdict.INVALID
        assert words in report.comparisons[0].reasons[0]
        assert exit_code(report) == 5


def test_unpaired_early_regress_is_that_of_the_mean_curves(table):
    worse = FAST + np.array([0.2, 0, 0, 0])
    arms = {"muon": noisy(SLOW), "nolah": noisy(worse, 5, seed=1)}
    (found,) = ask(table(arms), rule=FIXED, unpaired=True).comparisons
    base, chal = np.mean(np.round(arms["muon"], 8), axis=0), np.mean(np.round(arms["nolah"], 8), axis=0)
    assert found.early_regress == pytest.approx(chal[0] / base[0] - 1, rel=1e-4)
    assert found.verdict is Verdict.NO_GO
    assert "would be GO but for a guardrail" in found.reasons[1]


@pytest.mark.parametrize("unpaired", [False, True])
def test_results_of_others_are_capped(table, unpaired):
    report = ask(table(FAMILY), provenance="reported", rule=FIXED, unpaired=unpaired)
    assert {c.verdict for c in report.comparisons} == {Verdict.INCONCLUSIVE}
    assert all(any("uncapped: " in reason for reason in c.reasons) for c in report.comparisons)


def test_failures_are_not_dropped_in_silence(table):
    text = "\n".join(
        f"{arm},{seed},{loss},completed" for arm in ("muon", "a") for seed, loss in enumerate(FAMILY[arm]) if seed
    )
    results = table({"muon": [2.0]})
    results.path.write_text(f"arm,seed,loss,status\n{text}\nmuon,0,2.0,completed\na,0,,failed\n")
    results = read_results(results.path)
    looking = ask(results)
    assert looking.comparisons[0].verdict is Verdict.INCOMPLETE
    assert exit_code(looking) == 3
    for unpaired in (False, True):
        (found,) = ask(results, rule=FIXED, unpaired=unpaired).comparisons
        assert found.verdict is Verdict.INVALID
        assert "unequal failures" in found.reasons[0]


def test_a_price_is_given_only_where_one_is_known(table):
    results = table({"muon": FAMILY["muon"], "a": FAMILY["b"]})
    (free,) = ask(results).comparisons
    assert free.usd_per_pp.point is None
    assert "no cost is known" in free.usd_per_pp.undefined["point"]
    (priced,) = ask(results, cost_per_pair_usd=7.0).comparisons
    assert priced.usd_per_pp.point == pytest.approx(7 / priced.rel_diff_pct)
    lines = results.path.read_text().splitlines()
    costs = {"muon": 1.0, "a": 2.5}
    rows = [f"{line},{costs[line.split(',')[0]] + 0.1 * (i % 2)}" for i, line in enumerate(lines[1:])]
    results.path.write_text("\n".join([f"{lines[0]},cost_usd", *rows]) + "\n")
    (own,) = ask(read_results(results.path)).comparisons
    assert own.usd_per_pp.point == pytest.approx(3.6 / own.rel_diff_pct)


def test_next_pairs_have_their_price(table):
    (found,) = ask(table({"muon": losses(2.0, 4), "a": losses(1.995, 4, seed=5)}), cost_per_pair_usd=7.0).comparisons
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.next_cost_usd == 7 * found.next_pairs


def test_the_pairs_of_an_arm_have_one_price(table):
    arms = {"muon": losses(2.0, 4), "x": losses(1.995, 4, seed=5), "y": losses(1.995, 4, seed=6)}
    results = table(arms)
    price = {"muon": 1, "x": 1, "y": 9}
    lines = results.path.read_text().splitlines()
    results.path.write_text("\n".join([lines[0] + ",cost_usd", *(f"{r},{price[r.split(',')[0]]}" for r in lines[1:])]))
    for found in ask(read_results(results.path)).comparisons:
        assert found.next_cost_usd == (1 + price[found.arm]) * found.next_pairs
        assert "$" not in " ".join(found.reasons)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"printed": ("d",)}, "unknown challenger 'd'"),
        ({"printed": ("muon",)}, "'muon' is the baseline"),
        ({"printed": ("a",), "family": ("b",)}, "not in --family b"),
        ({"effect": 3.0, "unit": "nats"}, "over 100% of muon's mean loss"),
        ({"target": 2.0}, "has no curve; --target needs"),
        ({"target": 2.0, "effect": 100.0}, "under 100%"),
    ],
)
def test_questions_that_the_file_cannot_answer(table, given, said):
    with pytest.raises(UsageError, match=said):
        ask(table(FAMILY), **given)


def test_seeds_that_a_sequential_plan_has_no_place_for(table):
    arms = {arm: [None] * 20 + FAMILY[arm] for arm in ("muon", "a")}
    with pytest.raises(UsageError, match=r"share the seeds 20, .*--plan fixed"):
        ask(table(arms))
    assert ask(table(arms), rule=FIXED).comparisons[0].n == 6
    late = {arm: [None, *FAMILY[arm]] for arm in ("muon", "a")}
    (found,) = ask(table(late)).comparisons
    assert found.verdict is Verdict.INCOMPLETE
    assert any("--plan fixed" in reason for reason in found.reasons)


def test_a_target_that_was_reached_before_training_is_refused(table):
    results = table({"muon": [SLOW, SLOW], "a": [FAST, FAST]})
    results.path.write_text(results.path.read_text().replace(",50,", ",0,"))
    with pytest.raises(UsageError, match="before its first step"):
        ask(read_results(results.path), effect=1, target=2.7)


def test_an_arm_with_a_run_that_never_arrives_counts_in_the_family_and_lends_nothing_to_the_others(table):
    # On losses b would be the surer of the two, and the first that Holm steps over.
    arms = {"muon": noisy(SLOW), "a": noisy(SLOW - 0.001, seed=15), "b": [*noisy(FAST, 5, seed=2), FAST + 0.101]}
    a, b = ask(table(arms), effect=2, target=2.30, rule=FIXED).comparisons
    assert 0.22 < a.p_one_sided < 0.5
    assert a.p_adjusted == pytest.approx(2 * a.p_one_sided)
    assert (b.t, b.e_value, b.mean_diff) == (None, None, None)


def test_a_race_reads_every_arrival_from_the_runs_own_curve(table):
    # The baseline arrives at its last evaluation, a step at which the challenger was not evaluated.
    def write(results, shift):
        rows = []
        for seed in range(8):
            rows += [f"muon,{seed},{s},{3 + (3010 + seed % 3 - s) / 1000}" for s in (*range(100, 3001, 100), 3040)]
            rows += [f"nolah,{seed},{s},{3 + (3010 + shift - s) / 1000}" for s in range(100, 3201, 100)]
        results.path.write_text("\n".join(["arm,seed,step,loss", *rows]))
        return read_results(results.path)

    results = table({"muon": [SLOW], "nolah": [FAST]})
    for shift, verdict in ((-15, Verdict.EQUIVALENT), (150, Verdict.NO_GO)):
        report = ask(write(results, shift), effect=1, target=3.0, rule=FIXED)
        (found,) = report.comparisons
        assert (found.speed.baseline_never, found.speed.challenger_never) == (0, 0)
        logs = [np.log([3010 + seed % 3 for seed in range(8)]), np.log(3010 + shift)]
        assert found.mean_diff == pytest.approx(np.mean(logs[0] - logs[1]))
        assert found.speed.geometric_mean_ratio == pytest.approx(np.exp(found.mean_diff))
        assert found.verdict is verdict
        assert [arm.never for arm in report.steps_to_target] == [0, 0]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_race_of_unlike_lengths_keeps_the_guardrail(table, stopped):
    worse = np.array([2.9, 2.35, 2.26, 2.20])
    arms = {"muon": noisy(SLOW), "nolah": noisy(worse, seed=1)}
    if stopped:
        arms["nolah"] = [curve[:3] for curve in arms["nolah"]]
        arms["muon"][0] = SLOW + 0.2  # never arrives: the sign test
    results = table(arms)
    # 50 steps are within 30 % of what the shortest run has.
    results.path.write_text(results.path.read_text().replace(",150,", ",170,"))
    (found,) = ask(read_results(results.path), effect=2, target=2.31, rule=FIXED).comparisons
    assert found.early_regress == pytest.approx(0.3 / 2.6, rel=0.3)
    assert found.verdict is Verdict.NO_GO
    assert "early regress of" in " ".join(found.reasons)


@pytest.mark.parametrize("never", [False, True])
def test_a_guardrail_that_no_common_evaluation_can_check_is_said_to_be_unchecked(table, never):
    arms = {"muon": noisy(SLOW), "nolah": noisy(FAST, seed=1)}
    if never:
        arms["muon"][0] = SLOW + 0.2
    results = table(arms)
    lines = results.path.read_text().splitlines()
    results.path.write_text("\n".join(row.replace(",50,", ",60,") if row.startswith("nolah") else row for row in lines))
    (found,) = ask(read_results(results.path), effect=2, target=2.30, rule=FIXED).comparisons
    assert found.early_regress is None
    said = "no evaluations in the first 30% of the steps are common to the runs"
    assert f"early regress was not checked: {said}" in found.reasons
    assert found.undefined["early_regress"] == said


def test_a_target_that_every_run_is_below_from_its_first_evaluation_is_refused(table):
    arms = {"muon": noisy(SLOW), "nolah": noisy(FAST, seed=1)}
    with pytest.raises(UsageError, match=r"muon and nolah is at 2.9 or below .* lower --target"):
        ask(table(arms), effect=2, target=2.9)
    same = {"muon": noisy(SLOW), "nolah": noisy(SLOW)}
    (found,) = ask(table(same), effect=2, target=2.3).comparisons
    assert found.verdict is Verdict.INVALID  # here the arm did nothing


def test_the_p_of_a_race_is_that_of_the_sign_test_which_decided(table):
    both = {"muon": [*noisy(SLOW, 5), SLOW + 0.2], "nolah": [*noisy(FAST, 5, seed=1), FAST + 0.2]}
    (found,) = ask(table(both), effect=2, target=2.30, rule=FIXED).comparisons
    assert (found.p_one_sided, found.p_two_sided) == (7 / 64, 14 / 64)
    (turned,) = ask(
        table({"muon": both["nolah"], "nolah": both["muon"]}), effect=2, target=2.30, rule=FIXED
    ).comparisons
    assert (turned.p_one_sided, turned.p_two_sided) == (1, 14 / 64)
    (looking,) = ask(table(both), effect=2, target=2.30).comparisons
    assert (looking.p_one_sided, looking.p_two_sided, looking.p_adjusted) == (None, None, None)
    assert all("not tested" in looking.undefined[name] for name in ("p_one_sided", "p_two_sided", "p_adjusted"))


def priced(results, column, cost):
    """The file again with the cost of every run in one more column."""
    lines = results.path.read_text().splitlines()
    rows = [f"{row},{cost(*row.split(',')[:2])}" for row in lines[1:]]
    results.path.write_text("\n".join([f"{lines[0]},{column}", *rows]))
    return read_results(results.path)


@pytest.mark.parametrize(("column", "unit"), [("cost_usd", "usd"), ("seconds", "s")])
def test_cost_to_target_is_the_speed_times_the_price_of_a_step(table, column, unit):
    arms = {"muon": noisy(SLOW), "nolah": noisy(FAST, seed=1)}
    results = priced(table(arms), column, lambda arm, seed: 4 if arm == "muon" else 5)
    (found,) = ask(results, effect=2, target=2.30, rule=FIXED).comparisons
    cost = found.cost_to_target
    assert cost.geometric_mean_ratio == pytest.approx(found.speed.geometric_mean_ratio * 4 / 5)
    assert cost.ratio_ci95 == pytest.approx([ratio * 4 / 5 for ratio in found.speed.ratio_ci95])
    assert (found.cost_unit, found.cost_difference) == (unit, None)
    (unknown,) = ask(table(arms), effect=2, target=2.30, rule=FIXED).comparisons
    assert unknown.cost_to_target is None
    assert "cost_usd, or seconds" in unknown.undefined["cost_to_target"]


def test_cost_difference_is_that_of_whole_runs(table):
    arms = {"muon": losses(2.0), "nolah": losses(1.99, seed=1)}
    results = priced(
        table(arms), "cost_usd", lambda arm, seed: (4 if arm == "muon" else 5) + int(seed) % 2 * (arm == "muon")
    )
    (found,) = ask(results, rule=FIXED).comparisons
    assert found.cost_difference.mean_diff == pytest.approx(-0.5)
    assert found.cost_difference.ci95[0] < -0.5 < found.cost_difference.ci95[1]
    assert (found.cost_unit, found.cost_to_target) == ("usd", None)
    (unpaired,) = ask(results, rule=FIXED, unpaired=True).comparisons
    assert (unpaired.cost_difference, unpaired.cost_unit) == (None, None)


def test_a_cost_difference_is_not_taken_of_a_run_that_broke_off(table):
    arms = {"muon": losses(2.0), "nolah": [*losses(1.99, 5, seed=1), math.nan]}
    results = table({"muon": losses(2.0), "nolah": losses(1.99, seed=1)})
    results.path.write_text(
        "arm,seed,loss,cost_usd\n"
        + "".join(f"{arm},{seed},{loss},3\n" for arm in arms for seed, loss in enumerate(arms[arm]))
    )
    rule = FIXED | {"diverged_loss": 7.6}
    (found,) = ask(read_results(results.path, diverged_loss=7.6), rule=rule).comparisons
    assert "a run diverged" in found.undefined["cost_difference"]
