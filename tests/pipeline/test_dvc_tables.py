"""What `dvc exp show`, `metrics diff` and `plots` say of real experiments: few columns, names, titles, units."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from conftest import STUDY, Maker, Repository

pytestmark = pytest.mark.slow

EXPERIMENT = "second"


@pytest.fixture(scope="module")
def two(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Two cells: the first committed, the second an experiment on top; then the study's report from both."""
    repository = make(tmp_path_factory.mktemp("tables") / "repository")
    repository.dvc("exp", "run", "-S", "optimizer=muon", "-S", "seed=0")
    repository.commit("one cell")
    repository.dvc("exp", "run", "-n", EXPERIMENT, "-S", "optimizer=nolah", "-S", "seed=1")
    repository.git("checkout", "-q", "HEAD", "params.yaml")
    assert repository.muon("report", check=False).returncode == 3
    return repository


def plot(repository: Repository, *arguments: str) -> Any:
    return json.loads(repository.dvc("plots", *arguments, "--show-vega").stdout)


def test_the_table_of_experiments_fits_120_columns(two: Repository) -> None:
    shown = two.run(
        sys.executable, "-m", "dvc", "exp", "show", "--only-changed", "--drop", ".*/", COLUMNS="120"
    ).stdout  # fmt: skip
    lines = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 120
    (head,) = [line for line in lines if "Experiment" in line]
    assert set(head.split()) <= {
        "Experiment", "Created", "val_loss", "perplexity", "cost_usd", "seconds", "optimizer", "seed"
    }  # fmt: skip
    assert {"val_loss", "optimizer", "seed"} <= set(head.split())
    assert any(EXPERIMENT in line and "nolah" in line for line in lines)


def test_metrics_of_two_experiments_are_compared_by_name(two: Repository) -> None:
    changed = json.loads(two.dvc("metrics", "diff", "HEAD", EXPERIMENT, "--all", "--json").stdout)
    (of_cell,) = changed.values()
    assert set(of_cell) == {"val_loss", "perplexity", "seconds", "cost_usd"}
    assert of_cell["val_loss"]["diff"] == of_cell["val_loss"]["new"] - of_cell["val_loss"]["old"] != 0


def test_plots_diff_draws_a_named_line_an_experiment(two: Repository) -> None:
    drawn = plot(two, "diff", "HEAD", EXPERIMENT, "--targets", "one-cell")
    points = drawn["data"]["values"]
    assert {(p["rev"], p["run"]) for p in points} == {("HEAD", "muon, seed 0"), (EXPERIMENT, "nolah, seed 1")}
    # Evaluations only, step 0 left out: a field without a loss would be drawn as zero.
    assert [int(p["step"]) for p in points if p["rev"] == "HEAD"] == [2, 4, 6, 8]
    assert all(float(p["val_loss"]) > 1 for p in points)
    assert drawn["title"]["text"] == "runs/exp/current: validation loss"


def test_plots_show_draws_a_line_an_arm_with_units(two: Repository) -> None:
    drawn = plot(two, "show", STUDY)
    assert {p["run"] for p in drawn["data"]["values"]} == {"muon", "nolah"}
    assert drawn["title"]["text"] == f"{STUDY}: validation loss by arm, mean and range of the seeds"
    (line,) = [layer for layer in drawn["layer"] if layer["mark"]["type"] == "line"]
    assert line["encoding"]["y"]["title"] == "validation loss [nats/token]"
    assert drawn["encoding"]["x"]["title"] == "step"
    assert "<DVC_METRIC" not in json.dumps(drawn)
