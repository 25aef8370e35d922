"""Two attempts at one cell that end differently contradict each other, unless both agree to rounding only, and do."""

from __future__ import annotations

import pytest
from test_registry_ledger import record

from muonlab.pipeline.collect import _contradictions, _rounded
from muonlab.registry.record import Computing, RunRecord
from muonlab.registry.snapshot import DeclaredCell
from muonlab.registry.study import Study

ROUNDING, EXACT = "to rounding: deterministic algorithms where torch has them", "bit for bit: one thread"
STUDY = Study.model_validate(
    {
        "slug": "s",
        "question": "q",
        "workload": "tiny",
        "baseline": "muon",
        "challengers": ["nolah"],
        "seeds": [0, 1],
        "price_usd_per_gpu_hour": 0,
        "budget_usd": 0,
        "decision": {"min_effect": "0.5%"},
    }
)


def run(loss: float | None, repeats: str | None, **changes: object) -> RunRecord:
    said = {"device": "d", "precision": "float32", "seconds_by_part": {}, "peak_memory_bytes": 0}
    computing = None if repeats is None else Computing.model_validate({**said, "repeats": repeats})
    return record(0, loss, computing=computing, attempt_id=f"{loss} {repeats} {sorted(changes)}", **changes)


def judged(*records: RunRecord) -> tuple[int, int]:
    """How many findings, and how many notes."""
    cells = [DeclaredCell(arm="muon", seed=0, digest=records[0].cell_digest)]
    return len(list(_contradictions(list(records), cells, STUDY))), len(list(_rounded(list(records), cells)))


@pytest.mark.parametrize(
    ("first", "again", "findings", "notes"),
    [
        (run(5.0, ROUNDING), run(5.04, ROUNDING), 0, 1),
        (run(5.0, ROUNDING), run(4.96, ROUNDING), 0, 1),
        (run(5.0, ROUNDING), run(5.06, ROUNDING), 1, 0),
        (run(5.0, EXACT), run(5.0000001, EXACT), 1, 0),
        (run(5.0, EXACT), run(5.0000001, ROUNDING), 1, 0),
        (run(5.0, ROUNDING), run(5.0000001, EXACT), 1, 0),
        (run(5.0, EXACT, device_count=2), run(5.0000001, EXACT, device_count=2), 0, 1),
        (run(5.0, None), run(5.0000001, None), 1, 0),
        (run(5.0, ROUNDING), run(None, ROUNDING, status="diverged"), 1, 0),
        (run(None, ROUNDING, status="diverged"), run(None, ROUNDING, status="diverged", final_step=2), 1, 0),
        (run(5.0, ROUNDING), run(5.0, ROUNDING), 0, 0),
    ],
)
def test_only_what_agrees_to_rounding_by_the_word_of_both_is_no_contradiction(
    first: RunRecord, again: RunRecord, findings: int, notes: int
) -> None:
    assert judged(first, again) == (findings, notes)
