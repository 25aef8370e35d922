"""The protocol's worked examples as they read in a report; the numbers' origin: the statistics page's G1, G2, speed."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from reporting_studies import Outcome, made_up

from muonlab.registry.record import CurvePoint
from muonlab.reporting.blocks import Document, Table
from muonlab.reporting.course_wording import speed_sentence
from muonlab.reporting.document import build
from muonlab.reporting.standing import Standing, judge


def losses(*x: int) -> list[Outcome]:
    return [2 + 1e-4 * value for value in x]


G1 = {"muon": losses(623, 641, 610, 635, 618), "k": losses(602, 637, 575, 624, 609)}
G2 = {
    "muon": losses(623, 641, 610, 635, 618, 629, 607, 644),
    "k": losses(498, 531, 477, 526, 489, 517, 502, 508),
}


def priced(arms: dict[str, list[Outcome]]) -> Standing:
    """The study at $7 a pair: a made-up run takes 22.5 s and a second more on every later seed."""
    seeds = len(arms["muon"])
    return made_up(arms, price=7 * 3600 / (2 * (22.5 + (seeds - 1) / 2)))


def table(document: Document, title: str) -> dict[str, str]:
    """The first table of a section, of one arm: column -> cell; of columns of one name the first."""
    blocks = next(s.blocks for s in document.sections if s.title == title)
    found = next(block for block in blocks if isinstance(block, Table))
    (row,) = found.rows
    return {name: cell for (name, _), cell in reversed(list(zip(found.columns, row, strict=True)))}


@pytest.mark.parametrize(
    ("arms", "verdict", "mean", "interval", "e", "usd"),
    [
        (G1, "EQUIVALENT", 0.0016, (0.00007422, 0.00312578), 6.549857, (90.21, 46.16, 1969.52)),
        (G2, "GO", 0.0119875, (0.01096805, 0.01300695), 23689.31, (12.04, 11.10, 13.16)),
    ],
    ids=["G1", "G2"],
)
def test_the_tables_hold_the_golden_numbers(arms, verdict, mean, interval, e, usd):
    document = build(priced(arms), pictures=())
    row = table(document, "Comparisons")
    assert row["verdict"] == verdict
    half = (interval[1] - interval[0]) / 2
    assert float(row["better by [nats/token]"]) == pytest.approx(mean, abs=0.05 * half)
    assert [float(x) for x in re.findall(r"[+-][\d.]+", row["95% interval"])] == pytest.approx(
        interval, abs=0.05 * half
    )
    assert float(row["E"].replace(",", "")) == pytest.approx(e, rel=5e-3)
    cost = table(document, "Cost")["cost per percentage point of improvement"]
    assert [float(x.replace(",", "")) for x in re.findall(r"\$([\d,.]+\d)", cost)] == pytest.approx(usd, abs=0.011)


def test_the_golden_curves_have_their_speed():
    """Nine levels by inverting the two curves with another interpolation than the report's."""
    steps, base, ours = [50, 100, 150, 200], [2.60, 2.40, 2.30, 2.24], [2.70, 2.35, 2.26, 2.20]
    standing = made_up({"muon": [2.24], "k": [2.20]})
    held = {"muon": base, "k": ours}
    records = [
        r.model_copy(
            update={"curve": [CurvePoint(step=s, val_loss=x) for s, x in zip(steps, held[r.arm], strict=True)]}
        )
        for r in standing.snapshot.records
    ]
    again = judge(standing.snapshot.model_copy(update={"records": records}), [])
    levels = np.linspace(np.interp(80, steps, base), 2.24, 9)
    reach = [np.interp(-levels, -np.array(curve), steps) for curve in (base, ours)]
    expected = math.exp(float(np.mean(np.log(reach[0]) - np.log(reach[1]))))
    (c,) = again.comparisons
    assert c.speed is not None
    assert c.speed.geometric_mean_ratio == pytest.approx(expected, rel=1e-9)
    assert f"took {100 * (1 - 1 / expected):.2g}% fewer steps than muon" in speed_sentence(again, c)
    # 2.48 is reached by linear interpolation at step 80 and 81.43: nothing saved, and anything between evaluations.
    assert c.first_level is not None
    assert c.first_level.target == pytest.approx(2.48)
    assert c.first_level.steps_saved_pct == pytest.approx(100 * (1 - (50 + 50 * 0.22 / 0.35) / 80))
    assert c.first_level.grid_saved_pct == pytest.approx((-100, 50))
