"""`muon calibrate`: the table, its JSON, the noise of a study, and refusals."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from reporting_studies import BASELINE, NOISY, NOLAH, as_repository, made_up

from muonlab.analysis.calibrate import calibrate, render
from muonlab.analysis.threshold_cache import ThresholdCache
from muonlab.cli import main
from muonlab.reporting.standing import with_false_go
from muonlab.stats.rule import Rule

RULE = Rule(min_effect=1.0, min_effect_unit="nats")


def run(*arguments):
    return CliRunner().invoke(main, ["calibrate", "--studies", "1000", *arguments])


def test_the_table_fits_80_columns_and_repeats_for_a_seed():
    here, there = run("--seed", "3", "--n-max", "6"), run("--seed", "3", "--n-max", "6")
    assert here.exit_code in (0, 1)
    assert here.output == there.output
    assert run("--seed", "4", "--n-max", "6").output != here.output
    assert max(map(len, here.output.splitlines())) <= 80
    for word in ("normal", "t3", "skewed left", "skewed right", "unequal family", "amended", "divergence", "promise"):
        assert word in here.output


def test_json_has_every_error_with_its_promise():
    document = json.loads(run("--json", "--n-max", "6", "--plan", "fixed", "--alpha", "0.1").output)
    assert document["rule"]["fixed_n"] == 6
    assert document["own"] is None
    for null in document["nulls"]:
        for error in null["errors"]:
            assert 0 <= error["rate"]["value"] <= 1
            assert (error["promise"] is None) == ("promise" in error["undefined"])
    go = document["nulls"][0]["errors"][0]
    assert go["promise"] == pytest.approx(0.104)


def test_own_noise_says_how_few_pairs_it_is():
    differences = np.random.default_rng(0).standard_normal((5, 2))
    report = calibrate(RULE, studies=1_000, seed=0, own=("001-x", ("a", "b"), differences))
    assert report.own.false_go.pairs == 5
    text = " ".join(render(report).split())
    assert "001-x (a, b): with noise drawn from these 5 pairs" in text
    assert "own noise" in text


TWO = {"muon": BASELINE, "nolah": NOLAH, "other": NOISY}


@pytest.mark.parametrize(("amended", "undeclared"), [(False, 0), (True, 0), (True, 2)])
def test_the_own_noise_of_a_study_meets_its_own_rule_and_family(tmp_path, monkeypatch, amended, undeclared):
    """The rate is the one that its report quotes, but for the number of simulated studies."""
    standing = with_false_go(made_up(TWO, amended=amended).model_copy(update={"undeclared": undeclared}))
    slug = as_repository(standing, tmp_path)
    monkeypatch.chdir(tmp_path)
    own = json.loads(run("--noise-from", slug, "--studies", "20000", "--json").output)["own"]
    assert own["family_size"] == 2 + undeclared
    assert own["false_go"]["value"] == standing.false_go.value
    if undeclared:
        said = run("--noise-from", slug).output
        assert "(nolah, other, in a family of 4)" in " ".join(said.split())
        assert "amended: the e-process alone" in " ".join(said.split())
        assert max(map(len, said.splitlines())) <= 80


def test_the_noise_of_what_dunnetts_test_decides_is_refused(tmp_path, monkeypatch):
    slug = as_repository(made_up(TWO, decision={"plan": {"fixed": 5}, "correction": "dunnett"}), tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run("--noise-from", slug)
    assert result.exit_code == 2
    assert "only Holm's correction is simulated" in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--n-min", "5", "--n-max", "4"), "--n-max is 4 and --n-min is 5"),
        (("--alpha", "0.7"), "--alpha: found 0.7"),
        (("--g", "-1"), "--g: found -1"),
        (("--alpha", "1e-7"), "--alpha: found 1e-07"),
        (("--noise-from", "900-tune-tiny"), "it is a tuning study"),
        (("--noise-from", "no-such-study"), "unknown study 'no-such-study'"),
    ],
)
def test_refusals(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


def test_the_threshold_cache_keeps_its_values_between_processes(tmp_path):
    path = tmp_path / "a" / "t_star.json"
    first, second = ThresholdCache(path), ThresholdCache(path)
    first["x"] = 1.5
    second["y"] = 2.5
    assert dict(ThresholdCache(path)) == {"x": 1.5, "y": 2.5}
    path.write_text("{ damaged")
    assert dict(ThresholdCache(path)) == {}
