"""`muon compare` as it is typed: exit codes, one sentence for what is refused, JSON on stdout, 80 columns."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from muonlab.cli import main

PROMISED = {
    *("arm", "n", "mean_diff", "rel_diff_pct", "t", "p_one_sided", "p_two_sided", "p_adjusted", "ci95", "d_z", "g_z"),
    *("wilcoxon_p_one_sided", "signflip_p_one_sided", "tost_p", "e_value", "confidence_sequence", "required_n_80"),
    *("usd_per_pp", "verdict", "next_pairs", "reasons"),
}
BASE = ["--baseline", "muon", "--min-effect", "0.5%"]
TWELVE = "arm,seed,loss\n" + "".join(f"muon,{i},{2 + i % 3 / 99}\nnolah,{i},{2 + i % 5 / 99}\n" for i in range(12))


def curves(path, *, arms, seeds, every=10, last=200, noise=1e-3):
    rng = np.random.default_rng(0)
    lines = [
        f"{arm},{seed},{step},{2 + 3 * np.exp(-step / 60) - 0.02 * i + noise * rng.standard_normal():.6f}"
        for i, arm in enumerate(arms)
        for seed in range(seeds)
        for step in range(every, last + 1, every)
    ]
    path.write_text("\n".join(["arm,seed,step,loss", *lines]) + "\n")
    return len(lines)


@pytest.fixture
def muon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text(
        "arm,seed,loss\n"
        + "".join(f"muon,{i},{x}\nnolah,{i},{y}\n" for i, (x, y) in enumerate([(2.2, 2.1), (2.21, 2.1), (2.19, 2.11)]))
    )

    def run(*args):
        result = CliRunner().invoke(main, ["compare", *map(str, args)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def refused(result, *said):
    """A refusal: exit 2, nothing on stdout, one line that says these things."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    for words in said:
        assert words in result.stderr
    return True


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("arm,seed,loss\nmuon,0,2\nmuon,1,2.1\nnolah,2,2\n", BASE, ["share no seed", "--unpaired"]),
        ("arm,seed,loss\nmuon,0,2\nmuon,1,2.1\n", BASE, ["only arm"]),
        ("arm,seed,loss\nmuon,0,2\nnolah,0,low\n", BASE, ["line 3", "'low'"]),
        ("arm,seed,loss\nmuon,0,2\nnolah,0,nan\n", BASE, ["line 3", "--diverged-loss"]),
        ("arm,seed,val_loss\nmuon,0,2\nnolah,0,2\n", BASE, ["no column 'loss'", "Did you mean 'val_loss'?"]),
        ("arm,seed,loss\nmuon,0,2\nmuon,0,2.1\nnolah,0,2\n", BASE, ["line 3", "line 2"]),
        ("", BASE, ["the file is empty"]),
        ("\x00\x01", BASE, ["not a CSV file"]),
        ("arm,seed,loss,status\nmuon,0,2,dne\n", BASE, ["unknown status 'dne'", "Allowed"]),
        (None, ["--baseline", "muon"], ["--min-effect is missing"]),
        (None, ["--baseline", "muon", "--min-effect", "-1%"], ["--min-effect", "-1%"]),
        (None, ["--baseline", "muon", "--min-effect", "-0.1"], ["--min-effect", "positive"]),
        (None, ["--baseline", "muon", "--min-effect", "101%"], ["--min-effect", "100%"]),
        (None, ["--baseline", "muon", "--min-effect", "5"], ["over 100%", "5%"]),
        (None, ["--baseline", "muon", "--min-effect", "small"], ["--min-effect", "small"]),
        (None, ["--min-effect", "1%"], ["--baseline is missing", "muon, nolah"]),
        (None, ["--baseline", "moun", "--min-effect", "1%"], ["'moun'", "Did you mean 'muon'?"]),
        (None, [*BASE, "--challenger", "nola"], ["'nola'", "Did you mean 'nolah'?"]),
        (None, [*BASE, "--family", "nola"], ["'nola'", "Did you mean 'nolah'?"]),
        (None, [*BASE, "--family", ","], ["--family"]),
        (None, [*BASE, "--n-max", "3"], ["--n-max is 3", "--n-min is 4"]),
        (None, [*BASE, "--n-max", "101"], ["--n-max", "101"]),
        (None, [*BASE, "--alpha", "0.5"], ["--alpha", "0.5"]),
        (TWELVE, [*BASE, "--plan", "fixed", "--alpha", "1e-20"], ["--alpha", "1e-20", "1e-09"]),
        (TWELVE, [*BASE, "--alpha", "1e-7"], ["--alpha 1e-07", "--n-max 12", "fixed plan"]),
        (None, [*BASE, "--unpaired", "--plan", "sequential"], ["--unpaired", "--plan fixed"]),
        (None, [*BASE, "--column", "loss"], ["--column", "loss=val/loss"]),
        (None, [*BASE, "--column", "loss=a", "--column", "loss=b"], ["twice"]),
        (None, [*BASE, "--diverged-loss", "-1"], ["--diverged-loss"]),
        (None, [*BASE, "--diverged-loss", "nan"], ["--diverged-loss"]),
        (None, [*BASE, "--target", "2.1"], ["--target", "--column step=NAME"]),
        (None, [*BASE, "--target", "0"], ["--target"]),
    ],
)
def test_refusals(muon, tmp_path, text, options, said):
    if text is not None:
        (tmp_path / "pairs.csv").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert refused(muon("pairs.csv", *options), *said)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_file_is_refused(muon):
    assert refused(muon("nowhere.csv", *BASE), "nowhere.csv")


def test_exit_codes(muon, tmp_path):
    good = tmp_path / "good.csv"
    rows = [
        f"{arm},{seed},{2 + i * 0.05 + seed % 3 * 1e-3 * (1 + i)}"
        for i, arm in enumerate(("muon", "bad"))
        for seed in range(5)
    ]
    good.write_text("\n".join(["arm,seed,loss", *rows]))
    assert muon(good, *BASE).stdout.startswith("bad against muon: NO_GO")
    assert muon(good, *BASE).exit_code == 0
    assert muon(good, *BASE, "--fail-on-no-go").exit_code == 1
    good.write_text("\n".join(["arm,seed,loss", *rows[1:5], *rows[6:]]))
    assert muon(good, *BASE, "--fail-on-no-go").exit_code == 3
    assert muon(good, *BASE, "--plan", "fixed").exit_code == 0
    good.write_text(
        "arm,seed,loss\n" + "".join(f"{arm},{s},{2 + s / 100}\n" for arm in ("muon", "same") for s in range(5))
    )
    result = muon(good, *BASE, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["comparisons"][0]["verdict"] == "INVALID"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--plan", "fixed"],
        ["--unpaired"],
        ["--target", "2.1"],
        ["--target", "2.1", "--unpaired"],
        ["--target", "1.98"],
    ],
)
def test_json_has_what_was_promised_and_a_reason_for_every_null(muon, tmp_path, options):
    curves(tmp_path / "curves.csv", arms=("muon", "a", "b"), seeds=5)
    result = muon("curves.csv", "--baseline", "muon", "--min-effect", "1%", "--json", *options)

    def no_constant(name):
        raise AssertionError(f"{name} in the JSON")

    answer = json.loads(result.stdout, parse_constant=no_constant)
    assert {"baseline", "provenance", "plan", "comparisons"} <= set(answer)
    assert answer["plan"] == ("fixed" if {"--unpaired", "fixed"} & set(options) else "sequential")
    assert len(answer["comparisons"]) == 2
    for comparison in answer["comparisons"]:
        assert set(comparison) >= PROMISED
        assert set(comparison["usd_per_pp"]) >= {"point", "low", "high"}
        for part in (comparison, comparison["usd_per_pp"], comparison["speed"] or {}, comparison["unpaired"] or {}):
            for name, value in part.items():
                assert value is not None or part["undefined"][name]


@pytest.mark.parametrize("options", [[], ["--target", "2.1"], ["--target", "2.1", "--unpaired"], ["--unpaired"]])
def test_text_is_verdict_first_within_80_columns_and_claims_no_absence(muon, tmp_path, options):
    curves(tmp_path / "curves.csv", arms=("muon", "a-challenger-with-quite-a-long-name", "b"), seeds=12)
    given = ["curves.csv", "--baseline", "muon", "--min-effect", "1%", "--cost-per-pair", "7", *options]
    everything, one = muon(*given).stdout, muon(*given, "--challenger", "b").stdout
    assert everything.startswith("Against muon: ")
    assert one.startswith("b against muon: ")
    for text in (everything, one):
        assert max(map(len, text.splitlines())) <= 80
        # The one sentence that may say "no effect" says that it is not shown.
        assert "no effect" not in text.replace("evidence of no effect", "").replace("evidence of no\neffect", "")
        assert "interval" in text
        assert "nan" not in text.split()


def test_exports_of_trackers_need_only_names(muon, tmp_path):
    (tmp_path / "mlflow.csv").write_text(
        "run_id,status,params.optimizer,params.seed,metrics.val_loss\n"
        + "".join(
            f"r{s}{a},FINISHED,{a},{s},{2.2 - 0.05 * (a == 'nolah') + s % 3 / 1000 * (1 + (a == 'nolah'))}\n"
            for a in ("muon", "nolah")
            for s in range(4)
        )
    )
    names = ["--column", "arm=params.optimizer", "--column", "seed=params.seed", "--column", "loss=metrics.val_loss"]
    assert muon("mlflow.csv", *BASE, *names).stdout.startswith("nolah against muon: GO")


def test_twenty_thousand_rows_take_under_two_seconds(muon, tmp_path):
    rows = curves(tmp_path / "big.csv", arms=[*"abcdefghi", "muon"], seeds=10, every=1)
    assert rows == 20_000
    muon("pairs.csv", *BASE)  # imports
    start = time.process_time()
    result = muon("big.csv", *BASE, "--json")
    assert time.process_time() - start < 2
    assert len(json.loads(result.stdout)["comparisons"]) == 9


def test_help_of_the_command_loads_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom muonlab.cli import main\n"
        "assert '--min-effect' in CliRunner().invoke(main, ['compare', '--help']).stdout\n"
        "heavy = {'torch', 'scipy', 'pandas', 'numpy', 'mlflow', 'muonlab.analysis'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_min_effect_under_a_target_is_a_percentage_of_the_steps_with_or_without_its_sign(muon, tmp_path):
    curves(tmp_path / "curves.csv", arms=("muon", "a"), seeds=5)
    bare, signed = (
        muon("curves.csv", "--baseline", "muon", "--target", "2.1", "--min-effect", effect) for effect in ("1", "1%")
    )
    assert bare.stdout == signed.stdout
    assert "1% of the steps" in " ".join(bare.stdout.split())


def test_a_cache_that_cannot_be_written_changes_nothing(muon, tmp_path, monkeypatch):
    (tmp_path / "twelve.csv").write_text(TWELVE)
    (tmp_path / "file").write_text("in the way")
    given = ["twelve.csv", *BASE, "--n-max", "5", "--n-min", "3", "--alpha", "0.041"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = muon(*given)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (muon(*given).stdout, expected.exit_code) == (expected.stdout, 0)
    assert (tmp_path / "cache" / "muonlab" / "t_star.json").is_file()


@pytest.mark.parametrize(
    ("options", "said"), [([], "Cost of a run: $1.00 more than with muon"), (["--target", "2.2"], "Cost to 2.2: $")]
)
def test_costs_are_printed(muon, tmp_path, options, said):
    curves(tmp_path / "curves.csv", arms=("muon", "a"), seeds=5)
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    costs = {"muon": 2, "a": 3}
    (tmp_path / "curves.csv").write_text(
        "\n".join([lines[0] + ",cost_usd", *(f"{row},{costs[row.split(',')[0]]}" for row in lines[1:])])
    )
    text = muon("curves.csv", "--baseline", "muon", "--min-effect", "1%", *options).stdout
    assert said in text
    assert max(map(len, text.splitlines())) <= 80
