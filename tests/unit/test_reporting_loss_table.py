"""The table behind `dvc plots`: means over all runs of an arm or none, and a template that names its columns only."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from reporting_studies import BASELINE, NOLAH, STEPS, curve, made_up, record

from muonlab.reporting.loss_table import COLUMNS, NAME, write_loss_table

PROJECT = Path(__file__).parents[2]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / NAME).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_is_the_mean_of_all_runs_between_its_lowest_and_highest(tmp_path: Path) -> None:
    write_loss_table(made_up({"muon": BASELINE, "nolah": NOLAH}), tmp_path)
    found = rows(tmp_path)
    assert list(dict.fromkeys(row["run"] for row in found)) == ["muon", "nolah"]
    last = next(row for row in found if row["run"] == "nolah" and int(row["step"]) == STEPS)
    finals = [curve(float(loss), seed)[-1]["val_loss"] for seed, loss in enumerate(NOLAH)]
    assert last["seeds"] == "5"
    assert float(last["val_loss"]) == pytest.approx(math.fsum(map(float, NOLAH)) / 5, rel=1e-12)
    assert (float(last["lowest"]), float(last["highest"])) == (min(finals), max(finals))
    assert all(float(r["lowest"]) <= float(r["val_loss"]) <= float(r["highest"]) for r in found)


def test_no_mean_is_taken_over_survivors(tmp_path: Path) -> None:
    """The diverged run has its last finite loss at step 90: there the mean of its arm ends, at its height."""
    write_loss_table(made_up({"muon": BASELINE, "nolah": [*NOLAH[:4], "diverged"]}), tmp_path)
    steps = {arm: [int(r["step"]) for r in rows(tmp_path) if r["run"] == arm] for arm in ("muon", "nolah")}
    assert steps["nolah"][-1] == 90
    assert steps["muon"][-1] == STEPS
    end = [r for r in rows(tmp_path) if r["run"] == "nolah"][-1]
    assert (end["seeds"], float(end["highest"])) == ("5", 30.0)


def test_every_row_has_a_loss(tmp_path: Path) -> None:
    """An empty field is drawn as a loss of zero."""
    write_loss_table(made_up({"muon": BASELINE, "nolah": NOLAH}), tmp_path, cell=record("nolah", 3, "diverged"))
    found = rows(tmp_path)
    assert {row["run"] for row in found} == {"nolah, seed 3"}
    assert [int(row["step"]) for row in found] == [30, 60, 90]
    assert all(math.isfinite(float(row[name])) for row in found for name in ("val_loss", "lowest", "highest"))


def test_without_a_curve_there_is_no_table_and_no_old_one(tmp_path: Path) -> None:
    write_loss_table(made_up({"muon": BASELINE, "nolah": NOLAH}), tmp_path)
    write_loss_table(made_up({"muon": [None], "nolah": [None]}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_template_reads_columns_that_the_table_has() -> None:
    def fields(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["field"]} if isinstance(node.get("field"), str) else set()
            return own.union(*map(fields, node.values()))
        return set().union(*map(fields, node)) if isinstance(node, list) else set()

    template = json.loads((PROJECT / ".dvc" / "plots" / "val_loss.json").read_text())
    filled = {"<DVC_METRIC_X>", "<DVC_METRIC_Y>", "rev"}
    assert fields(template) - filled <= set(COLUMNS)
    assert filled <= fields(template)
