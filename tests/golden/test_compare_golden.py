"""The protocol's worked examples through `muon compare --json`; losses are 2 + x * 1e-4.

Origin: G1, G2, the family on G1's baseline and the reported single run of the protocol, each computed there by two
independent routes. Values are compared to the digits that the protocol prints.
"""

import json

import pytest
from click.testing import CliRunner

from muonlab.cli import main

G1_BASELINE = (623, 641, 610, 635, 618)
G1 = {"muon": G1_BASELINE, "nolah": (602, 637, 575, 624, 609)}
G2 = {"muon": (623, 641, 610, 635, 618, 629, 607, 644), "nolah": (498, 531, 477, 526, 489, 517, 502, 508)}
FAMILY = {
    "muon": G1_BASELINE,
    "first": G1["nolah"],
    "second": (590, 601, 588, 602, 581),
    "third": (630, 633, 617, 641, 611),
}
REPORTED = {"muon": ((100, 2.1059), (500, 2.0622716999053954)), "nolah": ((100, 2.3034), (500, 2.0601661467552184))}

G1_NUMBERS = {
    "mean_diff": 0.0016,
    "t": 2.911498,
    "p_two_sided": 0.04361271,
    "p_one_sided": 0.02180636,
    "ci95": [0.00007422, 0.00312578],
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
    "ci95": [0.01096805, 0.01300695],
    "d_z": 9.830562,
    "g_z": 8.731534,
    "wilcoxon_p_one_sided": 0.00390625,
    "wilcoxon_p_two_sided": 0.0078125,
    "signflip_p_one_sided": 0.00390625,
    "signflip_p_two_sided": 0.0078125,
    "tost_p": 0.996990,
    "required_n_80": 2,
    "e_value": 23689.31,
}
DIGITS = {"rel": 1e-6, "abs": 6e-9}  # intervals are printed to eight decimals


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    def ask(rows, *options, header="arm,seed,loss"):
        path = tmp_path_factory.mktemp("compare") / "results.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        result = CliRunner().invoke(main, ["compare", str(path), "--baseline", "muon", "--json", *options])
        assert (result.exit_code, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return ask


def finals(arms):
    return [f"{arm},{seed},{2 + x * 1e-4:.4f}" for arm, losses in arms.items() for seed, x in enumerate(losses)]


@pytest.fixture(scope="module")
def found(ask):
    options = ("--min-effect", "0.5%", "--cost-per-pair", "7", "--challenger", "nolah")
    return {name: ask(finals(arms), *options)["comparisons"][0] for name, arms in (("G1", G1), ("G2", G2))}


@pytest.mark.parametrize(
    ("example", "name", "value"),
    [("G1", *item) for item in G1_NUMBERS.items()] + [("G2", *item) for item in G2_NUMBERS.items()],
)
def test_number(found, example, name, value):
    assert found[example][name] == pytest.approx(value, **DIGITS)


@pytest.mark.parametrize(
    ("example", "point", "low", "high", "verdict"),
    [("G1", 90.21, 46.16, 1969.52, "EQUIVALENT"), ("G2", 12.04, 11.10, 13.16, "GO")],
)
def test_price_and_verdict(found, example, point, low, high, verdict):
    price = found[example]["usd_per_pp"]
    assert [round(price[end], 2) for end in ("point", "low", "high")] == [point, low, high]
    assert found[example]["verdict"] == verdict


def test_family_by_holm_and_by_dunnett(ask):
    comparisons = ask(finals(FAMILY), "--min-effect", "0.5%", "--plan", "fixed")["comparisons"]
    assert [c["arm"] for c in comparisons] == ["first", "second", "third"]
    for name, digits, values in (
        ("p_adjusted", (7, 8, 6), [0.0436127, 0.00062062, 0.605988]),
        ("dunnett_p", (7, 7, 4), [0.0211448, 0.0001304, 0.8075]),
    ):
        assert [round(c[name], d) for c, d in zip(comparisons, digits, strict=True)] == values


def test_reported_single_run(ask):
    rows = [f"{arm},0,{step},{loss}" for arm, curve in REPORTED.items() for step, loss in curve]
    options = ("--min-effect", "0.5%", "--cost-per-pair", "7", "--provenance", "reported")
    answer = ask(rows, *options, header="arm,seed,step,loss")
    (c,) = answer["comparisons"]
    assert answer["provenance"] == "reported"
    assert (c["n"], c["verdict"], c["next_pairs"], c["next_cost_usd"]) == (1, "INCONCLUSIVE", 3, 21.0)
    assert round(c["rel_diff_pct"], 4) == 0.1021
    assert round(c["usd_per_pp"]["point"], 2) == 68.56
    assert round(c["e_value"], 2) == 1.61
    assert round(100 * c["early_regress"], 2) == 9.38
    for name in ("t", "p_one_sided", "p_two_sided", "p_adjusted", "ci95", "d_z", "g_z", "confidence_sequence"):
        assert c[name] is None
        assert c["undefined"][name]
    said = " ".join(c["reasons"])
    assert "capped at INCONCLUSIVE" in said
    assert "the earliest GO is at 4 pairs" in said
