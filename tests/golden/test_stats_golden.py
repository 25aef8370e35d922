"""Golden numbers of the decision procedure, to six digits; losses are 2 + x * 1e-4.

Origin: the protocol's worked examples G1, G2, the family on G1's baseline, and the reported single run, each
computed there by two independent routes. The tests named `..._route` compute them a second way here:
quadrature for the e-process, enumeration for the permutation tests, scipy and statsmodels for the rest.
"""

from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from muonlab.registry.verdict import Verdict
from muonlab.stats.cost import cost_per_point
from muonlab.stats.decision import decide, decide_family, holm
from muonlab.stats.effect import describe, evidence_path, power, required_n
from muonlab.stats.evidence import log_e_value
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample, Run
from muonlab.stats.threshold import t_star

SIX_DIGITS = {"rel": 1e-6}
RULE = Rule(min_effect=0.5, min_effect_unit="percent", price_per_pair_usd=7)


def losses(*x: int) -> np.ndarray:
    return 2 + 1e-4 * np.array(x)


G1_BASELINE = losses(623, 641, 610, 635, 618)
G1 = (G1_BASELINE, losses(602, 637, 575, 624, 609))
G2 = (losses(623, 641, 610, 635, 618, 629, 607, 644), losses(498, 531, 477, 526, 489, 517, 502, 508))
FAMILY = {"first": G1[1], "second": losses(590, 601, 588, 602, 581), "third": losses(630, 633, 617, 641, 611)}
BOTH = pytest.mark.parametrize(("baseline", "challenger"), [G1, G2], ids=["G1", "G2"])

# Printed digits of the page; a value given to d digits is reproduced to half a unit of the last.
G1_NUMBERS = {
    "mean_diff": 0.0016,
    "t": 2.911498,
    "p_two_sided": 0.04361271,
    "p_one_sided": 0.02180636,
    "d_z": 1.302062,
    "g_z": 1.038895,
    "wilcoxon_p_one_sided": 0.03125,
    "wilcoxon_p_two_sided": 0.0625,
    "signflip_p_one_sided": 0.03125,
    "signflip_p_two_sided": 0.0625,
    "tost_p": 4.62480e-5,
    "required_n_80": 6,
    "e_value": 6.549857,
}
G2_NUMBERS = {
    "mean_diff": 0.0119875,
    "t": 27.805029,
    "p_two_sided": 1.99863e-8,
    "d_z": 9.830562,
    "g_z": 8.731534,
    "wilcoxon_p_one_sided": 0.00390625,
    "wilcoxon_p_two_sided": 0.0078125,
    "signflip_p_one_sided": 0.00390625,
    "signflip_p_two_sided": 0.0078125,
    "tost_p": 0.996990,
    "required_n_80": 2,
}


@pytest.mark.parametrize(
    ("pairs", "name", "value"),
    [(G1, *item) for item in G1_NUMBERS.items()] + [(G2, *item) for item in G2_NUMBERS.items()],
    ids=[f"G1-{name}" for name in G1_NUMBERS] + [f"G2-{name}" for name in G2_NUMBERS],
)
def test_estimate(pairs, name, value):
    assert getattr(describe(PairedSample.of("arm", *pairs), RULE), name) == pytest.approx(value, **SIX_DIGITS)


@pytest.mark.parametrize(
    ("pairs", "interval"),
    # The page prints G1's lower end .00007422: eight decimals, hence the absolute tolerance.
    [(G1, (0.00007422, 0.00312578)), (G2, (0.01096805, 0.01300695))],
    ids=["G1", "G2"],
)
def test_interval(pairs, interval):
    assert describe(PairedSample.of("arm", *pairs), RULE).ci95 == pytest.approx(interval, abs=5e-9)


def test_g2_evidence_is_printed_to_a_cent():
    assert describe(PairedSample.of("arm", *G2), RULE).e_value == pytest.approx(23689.31, abs=5e-3)


@pytest.mark.parametrize(
    ("pairs", "usd"), [(G1, (90.21, 46.16, 1969.52)), (G2, (12.04, 11.10, 13.16))], ids=["G1", "G2"]
)
def test_usd_per_point_to_a_cent(pairs, usd):
    cost = describe(PairedSample.of("arm", *pairs), RULE).usd_per_pp
    assert (cost.point, cost.low, cost.high) == pytest.approx(usd, abs=5e-3)


def test_verdicts():
    assert decide(PairedSample.of("arm", *G1), RULE).verdict is Verdict.EQUIVALENT
    assert decide(PairedSample.of("arm", *G2), RULE).verdict is Verdict.GO


def family_samples():
    return [PairedSample.of(name, G1_BASELINE, challenger) for name, challenger in FAMILY.items()]


def test_family_holm():
    decisions = decide_family(family_samples(), RULE)
    adjusted = [decision.p_adjusted for decision in decisions]
    # Half a unit of each printed last digit.
    for value, printed, unit in zip(adjusted, [0.0436127, 0.00062062, 0.605988], [1e-7, 1e-8, 1e-6], strict=True):
        assert value == pytest.approx(printed, rel=0, abs=unit / 2)


def test_family_holm_second_route():
    p = [describe(sample, RULE).p_one_sided for sample in family_samples()]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_reported_single_run():
    sample = PairedSample(
        arm="nolah",
        baseline=(Run(seed=0, loss=2.0622716999053954),),
        challenger=(Run(seed=0, loss=2.0601661467552184),),
        provenance="reported",
        early_regress=(2.3034 - 2.1059) / 2.1059,
    )
    e, decision = describe(sample, RULE), decide(sample, RULE)
    assert e.rel_diff_pct == pytest.approx(0.1021, abs=5e-5)
    assert e.usd_per_pp.point == pytest.approx(68.56, abs=5e-3)
    assert e.early_regress == pytest.approx(0.0938, abs=5e-5)
    assert e.e_value == pytest.approx(1.608, abs=5e-4)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.earliest_go_n == 4
    assert decision.next_pairs == 3
    assert decision.next_cost_usd == 21


def test_product_over_the_two_reported_studies():
    # 350M: 2.3409 against 2.3402; 1B as above. One pair's E depends on the sign only, and independent
    # E-values multiply.
    e_350m = np.exp(log_e_value(1, 2.3409 - 2.3402, 0.0, 2.0))
    e_1b = np.exp(log_e_value(1, 2.0622717 - 2.0601661, 0.0, 2.0))
    assert e_350m * e_1b == pytest.approx(2.59, abs=5e-3)
    assert np.exp(log_e_value(1, -1.0, 0.0, 2.0)) == pytest.approx(0.392, abs=5e-4)


def test_largest_evidence_of_one_two_and_three_pairs():
    largest = np.exp(log_e_value(np.array([1, 2, 3]), 1.0, 0.0, 2.0))
    assert largest == pytest.approx([1.61, 4.24, 13.83], abs=5e-3)


@pytest.mark.parametrize(
    ("n_max", "value"),
    [(5, 2.162), (6, 2.069), (8, 1.983), (10, 1.948), (12, 1.930), (16, 1.919), (20, 1.909)],
)
def test_t_star(n_max, value):
    assert t_star(n_max, 0.05, n_min=4, g=2.0) == value


@BOTH
def test_evidence_quadrature_route(baseline, challenger):
    """E as the mean likelihood ratio of noncentral t over the half-normal prior."""
    d = baseline - challenger
    path = evidence_path(PairedSample.of("arm", baseline, challenger), RULE)
    assert len(path) == d.size
    # At n = 1 only the sign is left: the mean chance of a positive difference over the prior, over one half.
    first = integrate.quad(lambda x: 4 * stats.norm.pdf(x, scale=np.sqrt(RULE.g)) * stats.norm.cdf(x), 0, 20)[0]
    assert path[0] == (1, pytest.approx(first, rel=1e-9))
    for n, e_value in path[1:]:
        t = stats.ttest_1samp(d[:n], 0).statistic

        def integrand(delta, n=n, t=t):
            prior = 2 * stats.norm.pdf(delta, scale=np.sqrt(RULE.g))
            return prior * stats.nct.pdf(t, n - 1, np.sqrt(n) * delta) / stats.t.pdf(t, n - 1)

        expected = integrate.quad(integrand, 0, 20, points=[1, 5, 10], limit=200)[0]
        # scipy's nct.pdf is the limit here: its relative error reaches 1e-7 far in the tail.
        assert e_value == pytest.approx(expected, rel=1e-6)


@BOTH
def test_t_and_interval_scipy_route(baseline, challenger):
    e = describe(PairedSample.of("arm", baseline, challenger), RULE)
    two_sided = stats.ttest_rel(baseline, challenger)
    one_sided = stats.ttest_rel(baseline, challenger, alternative="greater")
    assert e.t == pytest.approx(two_sided.statistic, rel=1e-12)
    assert e.p_two_sided == pytest.approx(two_sided.pvalue, rel=1e-9)
    assert e.p_one_sided == pytest.approx(one_sided.pvalue, rel=1e-9)
    assert e.ci95 == pytest.approx(tuple(two_sided.confidence_interval(0.95)), rel=1e-9)


@BOTH
def test_tost_statsmodels_route(baseline, challenger):
    e = describe(PairedSample.of("arm", baseline, challenger), RULE)
    margin = 0.005 * baseline.mean()
    assert e.margin == pytest.approx(margin, rel=1e-12)
    assert e.tost_p == pytest.approx(ttost_paired(baseline, challenger, -margin, margin)[0], rel=1e-9)


@BOTH
def test_permutation_enumeration_route(baseline, challenger):
    e = describe(PairedSample.of("arm", baseline, challenger), RULE)
    d = np.round((baseline - challenger) * 1e4)
    signs = np.array(list(product([1, -1], repeat=d.size)))
    for name, scores in (("signflip", d), ("wilcoxon", np.sign(d) * stats.rankdata(np.abs(d)))):
        null = signs @ np.abs(scores)
        one_sided = np.mean(null >= scores.sum())
        assert getattr(e, f"{name}_p_one_sided") == pytest.approx(one_sided, rel=1e-12)
        assert getattr(e, f"{name}_p_two_sided") == pytest.approx(2 * one_sided, rel=1e-12)
    library = stats.wilcoxon(d, alternative="greater", method="exact").pvalue
    assert e.wilcoxon_p_one_sided == pytest.approx(library, rel=1e-12)


@BOTH
def test_required_n_and_hedges_simulation_free_route(baseline, challenger):
    e = describe(PairedSample.of("arm", baseline, challenger), RULE)
    d = baseline - challenger
    d_z = d.mean() / d.std(ddof=1)

    def library_power(n):
        return stats.nct.sf(stats.t.ppf(0.95, n - 1), n - 1, np.sqrt(n) * d_z)

    assert library_power(e.required_n_80) >= 0.8
    assert e.required_n_80 == 2 or library_power(e.required_n_80 - 1) < 0.8
    # g_z is unbiased: E[d_z] = delta / correction, and the mean of a noncentral t is known to scipy.
    correction = np.sqrt(d.size) * d_z / stats.nct.mean(d.size - 1, np.sqrt(d.size) * d_z)
    assert e.g_z == pytest.approx(d_z * correction, rel=1e-9)


@BOTH
def test_minimum_detectable_effect_has_80_percent_power(baseline, challenger):
    e = describe(PairedSample.of("arm", baseline, challenger), RULE)
    assert power(e.n, e.mde_80 / e.sd_diff, RULE.alpha) == pytest.approx(0.8, abs=1e-9)
    assert required_n(e.mde_80 / e.sd_diff * (1 + 1e-9), RULE.alpha) == e.n


@BOTH
def test_usd_per_point_fieller_route(baseline, challenger):
    """Fieller's quadratic with a certain numerator: (C - x R)^2 = x^2 q^2 s^2 / n has the interval's ends as
    roots."""
    rel = 100 * (baseline - challenger) / baseline
    q2 = stats.t.ppf(0.975, rel.size - 1) ** 2 * rel.var(ddof=1) / rel.size
    roots = sorted(np.roots([rel.mean() ** 2 - q2, -2 * 7 * rel.mean(), 7**2]).real)
    cost = describe(PairedSample.of("arm", baseline, challenger), RULE).usd_per_pp
    assert (cost.low, cost.high) == pytest.approx(roots, rel=1e-9)


def test_usd_per_point_unbounded_sentence():
    cost = cost_per_point(0.1, (-0.05, 0.25), 7.0)
    assert cost.point is None
    assert cost.high is None
    assert cost.sentence.startswith("at least $28.00 per percentage point, unbounded above")
