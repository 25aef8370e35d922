"""`muon power`: pilots, units, the table, the figure, and refusals."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from reporting_studies import BASELINE, NOISY, NOLAH, as_repository, made_up

from muonlab.cli import main

PILOT = """arm,seed,loss
muon,0,2.0623
muon,1,2.0641
muon,2,2.0610
muon,3,2.0635
nolah,0,2.0602
nolah,1,2.0637
nolah,2,2.0575
nolah,3,nan
"""


def run(*arguments):
    return CliRunner().invoke(main, ["power", "--studies", "1000", "--n-max", "6", *map(str, arguments)])


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_the_table_fits_80_columns_and_prices_each_row():
    result = run("--sd-diff", "0.2%", "--min-effect", "0.1%", "--cost-per-pair", 7)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    for word in ("$28.00", "$42.00", "True effect 0.2% (2 min_effect)", "INCONCLUSIVE", "pairs on average"):
        assert word in result.output


def test_without_a_price_no_dollars_are_shown():
    said = run("--sd-diff", "0.2%", "--min-effect", "0.1%").output
    assert "$" not in said
    assert "no price is declared" in said
    assert "no price is declared" not in run("--sd-diff", "0.2%", "--min-effect", "0.1%", "--cost-per-pair", 7).output


def test_percent_and_absolute_sizes_agree():
    relative = document("--sd-diff", "0.2%", "--min-effect", "0.1%")
    absolute = document("--sd-diff", "0.004", "--min-effect", "0.002")
    mixed = document("--sd-diff", "0.004", "--min-effect", "0.1%", "--baseline-loss", "2")
    chances = [[e["chances"] for e in d["power"]["effects"]] for d in (relative, absolute, mixed)]
    assert chances[0] == chances[1] == chances[2]
    assert mixed["power"]["sd_diff"] == pytest.approx(0.2)


def test_run_sd_and_correlation_make_the_sd_of_a_difference():
    d = document("--run-sd", "0.01", "--correlation", "0.92", "--min-effect", "0.01")
    assert d["power"]["sd_diff"] == pytest.approx(0.01 * np.sqrt(2 * 0.08))


def test_a_further_effect_and_a_family():
    alone = document("--sd-diff", "1", "--min-effect", "1", "--effect", "-0.5")
    among = document("--sd-diff", "1", "--min-effect", "1", "--effect", "-0.5", "--family", 3)
    assert [e["effect"] for e in alone["power"]["effects"]] == [-0.5, 0, 0.5, 1, 2]
    go = [d["power"]["effects"][-1]["chances"][-1]["go"] for d in (alone, among)]
    assert go[1] < go[0]
    assert among["power"]["level"] == pytest.approx(0.05 / 3)


def test_a_pilot_in_a_csv_gives_its_sd_and_how_uncertain_it_is(tmp_path):
    path = tmp_path / "pilot.csv"
    path.write_text(PILOT)
    d = document(path, "--baseline", "muon", "--min-effect", "0.1%")
    differences = np.array([0.0021, 0.0004, 0.0035])
    assert d["noise"]["sd_diff"] == pytest.approx(differences.std(ddof=1))
    assert d["noise"]["pairs"] == 3
    assert "1 with a diverged run left out" in d["noise"]["source"]
    low, high = d["noise"]["sd_interval95"]
    assert low < d["noise"]["sd_diff"] < high
    assert d["unit"] == "%"
    assert d["power"]["sd_diff"] == pytest.approx(100 * differences.std(ddof=1) / np.mean([2.0623, 2.0641, 2.0610]))


def test_the_figure_is_drawn_with_units(tmp_path):
    path = tmp_path / "power.svg"
    assert run("--sd-diff", "1", "--min-effect", "1", "--figure", path).exit_code == 0
    first = path.read_text()
    assert first.startswith("<?xml")
    assert run("--sd-diff", "1", "--min-effect", "1", "--figure", path).exit_code == 0
    assert path.read_text() == first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "give one of a pilot"),
        (("--sd-diff", "1", "--run-sd", "1", "--min-effect", "1"), "give one of a pilot"),
        (("--sd-diff", "1"), "--min-effect is missing"),
        (("--sd-diff", "1", "--min-effect", "-1"), "--min-effect: found -1.0"),
        (("--sd-diff", "1", "--min-effect", "150%"), "--min-effect: found '150%'"),
        (("--sd-diff", "0", "--min-effect", "1"), "--sd-diff: found 0.0"),
        (("--sd-diff", "1", "--min-effect", "1%"), "give --baseline-loss"),
        (("--sd-diff", "1", "--min-effect", "1", "--n-min", "7"), "n_max must be at least n_min"),
        (("--sd-diff", "1", "--min-effect", "1", "--correlation", "0.5"), "--correlation: it belongs to --run-sd"),
        (("--run-sd", "1", "--min-effect", "1", "--correlation", "1"), "--correlation: found 1"),
        (("--sd-diff", "1", "--min-effect", "1", "--effect", "1%"), "--effect: found '1%'"),
        (("--sd-diff", "1", "--min-effect", "1", "--figure", "power.docs"), "unknown ending '.docs'"),
        (("--sd-diff", "1", "--min-effect", "1", "--alpha", "1e-7"), "--alpha: found 1e-07"),
        (("900-tune-tiny", "--min-effect", "0.1%"), "it is a tuning study"),
        (("no-such-study", "--min-effect", "1"), "unknown study 'no-such-study'"),
    ],
)
def test_refusals(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


@pytest.mark.parametrize(
    ("text", "arguments", "named"),
    [
        (PILOT, (), "--baseline is missing"),
        (PILOT, ("--baseline", "muom"), "Did you mean 'muon'?"),
        (PILOT, ("--baseline", "muon", "--challenger", "muon"), "'muon' is the baseline"),
        (PILOT.replace("nolah,", "nolah,1"), ("--baseline", "muon"), "share no seed"),
        ("arm,seed,loss\na,0,2\nb,0,1\n", ("--baseline", "a"), "1 pairs of converged runs"),
    ],
)
def test_refused_pilots(tmp_path, text, arguments, named):
    path = tmp_path / "pilot.csv"
    path.write_text(text)
    result = run(path, "--min-effect", "0.1%", *arguments)
    assert result.exit_code == 2
    assert named in result.output


TWO = {"muon": BASELINE, "nolah": NOLAH, "other": NOISY}


def test_a_study_gives_its_family_and_whether_it_was_amended(tmp_path, monkeypatch):
    amended = made_up(TWO, decision={"plan": {"fixed": 5}, "correction": "dunnett"}, amended=True)
    slug = as_repository(amended.model_copy(update={"undeclared": 2}), tmp_path)
    monkeypatch.chdir(tmp_path)
    d = document(slug)
    assert (d["family_size"], d["power"]["level"]) == (4, pytest.approx(0.05 / 4))
    assert d["rule"]["amended"] is True
    assert any("amended" in note for note in d["notes"])
    said = run(slug).output
    assert "amended" in said
    assert "1 of a family of 4" in said
    assert max(map(len, said.splitlines())) <= 80


def test_what_dunnetts_test_decides_is_refused(tmp_path, monkeypatch):
    slug = as_repository(made_up(TWO, decision={"plan": {"fixed": 5}, "correction": "dunnett"}), tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run(slug)
    assert result.exit_code == 2
    assert "Dunnett's test decides over its family of 2" in result.output
