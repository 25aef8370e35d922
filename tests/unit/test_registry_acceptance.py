"""An acceptance is a row of the ledger like any other, and names two digests one cell only where code alone differs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reporting_studies import BASELINE, NOLAH, made_up
from test_registry_ledger import record

from muonlab.pipeline.accept import enough_steps
from muonlab.pipeline.collect import _contradictions
from muonlab.registry import ledger
from muonlab.registry.acceptance import (
    Acceptance,
    accepted_after,
    mislabelled,
    older_digests,
    refuted,
    under_code,
)
from muonlab.registry.cell import Cell, Inputs, OptimizerSpec
from muonlab.registry.record import Provenance
from muonlab.registry.settings import WorkloadSettings
from muonlab.registry.snapshot import DeclaredCell
from muonlab.reporting.standing import Evaluation, judge

PROVENANCE = Provenance(commit="c", dirty=False, python="3", torch="2", transformers="5", device="c", host_os="L")
CELL = Cell(
    workload="tiny", arm="muon", seed=0, settings=WorkloadSettings(steps=8, eval_every=2),
    optimizer=OptimizerSpec(kind="muon", options={"lr": 0.02}),
    inputs=Inputs(data="d", tokenizer="t", code="new", environment="e"),
)  # fmt: skip
OLD = under_code(CELL, "old").digest


def acceptance(name: str = "a", *, difference: str | None = None, steps: int = 4, **cell: Any) -> Acceptance:
    carried = {"arm": "muon", "seed": 0, "from_code": "old", "from_digest": OLD, "code": "new", "digest": CELL.digest}
    return Acceptance.model_validate(
        {
            "acceptance_id": name, "study": "s", "workload": "tiny", "command": "muon accept s",
            "made_at": f"2026-01-01T00:00:0{len(name)}+00:00", "environment": "e", "provenance": PROVENANCE,
            "retrained": [
                {
                    "arm": "muon", "seed": 0, "attempt_id": "0", "from_code": "old", "code": "new", "steps": steps,
                    "of_steps": 8, "rows": 3, "weights_compared": False, "loss_compared": difference is None,
                    "difference": difference, "wall_seconds": 1.0, "cost_usd": 0.0,
                }
            ],
            "carried": [] if difference else [{**carried, **cell}],
        }
    )  # fmt: skip


def test_a_row_comes_back_as_it_was_written_once_however_often_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rows = [record(0), acceptance("bb"), acceptance("a", difference="muon-0: at step 2")]
    ledger.append(path, rows)
    before = path.read_bytes()
    for held in (ledger.append(path, rows), ledger.read(path)):
        assert [a.acceptance_id for a in held.acceptances] == ["a", "bb"]  # by their time
        assert (held.records, held.findings) == ([record(0)], [])
    assert path.read_bytes() == before


def test_an_edited_row_is_found_and_carries_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [acceptance()])
    path.write_text(path.read_text().replace('"steps":4', '"steps":8'))
    held = ledger.read(path)
    assert "line 1 was edited" in held.findings[0]
    assert held.acceptances == ()


def test_a_second_content_under_one_name_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(ledger.to_line(acceptance(steps=steps)) + "\n" for steps in (4, 8)))
    assert "line 2 is the acceptance a, which an earlier line has with another content" in ledger.read(path).findings[0]


def test_a_refusal_that_was_deleted_comes_back_from_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        named = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        subprocess.run(named, cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / "ledger.jsonl"
    git("init")
    ledger.append(path, [record(0), acceptance(difference="muon-0: at step 2")])
    git("add", path.name)
    git("commit", "-m", "a difference")
    path.write_text(ledger.to_line(record(0)) + "\n")
    git("commit", "-am", "hide it")
    held = ledger.append(path, [])
    assert [a.acceptance_id for a in held.acceptances] == ["a"]
    assert "the acceptance a of s: its row was deleted from ledger.jsonl; it is put back" in held.notes[0]


def test_a_version_that_knows_no_acceptance_says_to_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [acceptance()])
    monkeypatch.delitem(ledger.ROWS, 2)
    assert "has schema_version 2, and this muonlab reads 1: a newer one wrote it" in ledger.read(path).findings[0]


@pytest.mark.parametrize("changes", [{"arm": "nolah"}, {"from_code": "older"}, {"code": "newer"}])
def test_a_cell_is_carried_only_by_a_run_of_its_arm_and_code(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="without a run of that arm and code"):
        acceptance(**changes)


def test_nothing_is_carried_beside_a_difference() -> None:
    content = acceptance().model_dump(mode="json")
    content["retrained"].append({**content["retrained"][0], "difference": "at step 2"})
    with pytest.raises(ValidationError, match="although a difference was found"):
        Acceptance.model_validate(content)


def test_digests_are_equal_only_where_code_alone_differs() -> None:
    assert older_digests([acceptance()]) == {CELL.digest: [OLD]}
    assert not list(mislabelled([acceptance()], [CELL]))
    slower = Cell.model_validate({**CELL.model_dump(), "optimizer": {"kind": "muon", "options": {"lr": 0.01}}})
    forged = acceptance(from_digest=under_code(slower, "old").digest)
    (sentence,) = mislabelled([forged], [CELL])
    assert "differ in more than their code" in sentence


def test_a_difference_found_later_takes_an_acceptance_back() -> None:
    found = acceptance("bb", difference="muon-0: at step 6 lr is 2.0, recorded 1.0", steps=8)
    assert not list(refuted([acceptance()], {CELL.digest}))
    (sentence,) = refuted([acceptance(), found], {CELL.digest})
    assert "after 4 steps, and another comparison of the two found a difference (muon-0: at step 6" in sentence
    assert not list(refuted([acceptance(), found], {"another study's cell"}))


def test_the_longest_comparison_counts() -> None:
    both = [acceptance(), acceptance("bb", steps=8)]
    assert (accepted_after(both, OLD, "new"), accepted_after(both, OLD, "newer")) == (8, None)


@pytest.mark.parametrize(
    ("steps", "warmup", "every", "enough"),
    [(200, 20, 20, 40), (500, 50, 50, 100), (1000, 50, 50, 100), (10, 5, 5, 10), (2000, 0, 50, 200), (7, 6, 5, 7)],
)
def test_enough_steps_are_past_the_warm_up_and_a_tenth_of_the_run(
    steps: int, warmup: int, every: int, enough: int
) -> None:
    settings = WorkloadSettings(steps=steps, warmup_steps=warmup, eval_every=every, schedule="constant")
    assert enough_steps(settings) == enough


def test_two_outcomes_of_a_cell_under_two_codes_contradict_each_other_once_it_was_carried_over() -> None:
    runs = [record(0, 5.0, digest="old"), record(0, 4.0, digest="new")]
    study = made_up({"muon": [5.0], "nolah": [5.0]}).snapshot.study.model_copy(update={"slug": "s"})

    def found(older: list[str]) -> list[str]:
        return list(_contradictions(runs, [DeclaredCell(arm="muon", seed=0, digest="new", older=older)], study))

    (uncarried,) = found([])
    assert "recorded in this study under other inputs (" in uncarried
    (contradiction,) = found(["old"])
    assert "two attempts at the same cell ended differently (val_loss 5.0 and 4.0)" in contradiction


def test_weights_of_a_carried_run_are_still_held_against_its_record() -> None:
    """Under either digest: the outputs may be those of the older code or of a run by the newer."""
    snapshot = made_up({"muon": BASELINE, "nolah": NOLAH}).snapshot
    first = snapshot.cells[0]
    carried = first.model_copy(update={"digest": "new", "older": [first.digest]})
    snapshot = snapshot.model_copy(update={"cells": [carried, *snapshot.cells[1:]]})
    for digest in carried.digests:
        line = Evaluation(
            arm=first.arm, seed=first.seed, cell_digest=digest, weights_sha256="w", val_loss=1.0, perplexity=2.7,
            prompt="", sample="",
        )  # fmt: skip
        standing = judge(snapshot, [line])
        assert standing.cells[0].state == "completed"
        assert any("its weights score 1.0 nats/token" in finding for finding in standing.integrity)
