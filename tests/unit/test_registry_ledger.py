"""The ledger is append-only, says what was edited, and puts back what was deleted."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.registry import ledger
from muonlab.registry.record import Hashes, Provenance, RunRecord


def record(
    seed: int = 0, loss: float | None = 5.0, *, digest: str = "", attempt_id: str = "", **changes: object
) -> RunRecord:
    digest = digest or f"{seed:064x}"
    content: dict[str, object] = {
        "study": "s", "workload": "tiny", "arm": "muon", "seed": seed, "cell_digest": digest, "registration": "r",
        "status": "completed" if loss is not None else "failed", "attempt": 1,
        "attempt_id": attempt_id or f"{seed}-{loss}", "started_at": "2026-01-01T00:00:00+00:00",
        "resumed_from_step": 0, "val_loss": loss, "perplexity": None, "final_step": 3, "tokens": 9,
        "wall_seconds": 1.5, "device_count": 1, "cost_usd": 0.0, "curve": [],
        "hashes": Hashes(data="d", tokenizer="t", init="i", order="o", weights=str(loss), code="c", environment="e"),
        "provenance": Provenance(
            commit=None, dirty=None, python="3", torch="2", transformers="5", device="c", host_os="L"
        ),
    }  # fmt: skip
    return RunRecord.model_validate({**content, **changes})


losses = st.one_of(st.none(), st.floats(min_value=0, max_value=1e300))


@given(st.integers(0, 10), losses)
def test_a_line_returns_the_record_it_was_made_from(seed: int, loss: float | None) -> None:
    made = record(seed, loss)
    assert ledger.parse_line(ledger.to_line(made)) == made


@given(st.data())
@settings(max_examples=60)
def test_any_edit_of_a_line_is_found(data: st.DataObject) -> None:
    content = json.loads(ledger.to_line(record()))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = data.draw(st.sampled_from(["x", 1, None, 4.99]).filter(lambda value: value != content[key]))
    with pytest.raises(ValueError, match=r"edited|schema_version|not a"):
        ledger.parse_line(json.dumps(content))


def test_appending_twice_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = ledger.append(path, [record(0), record(1)])
    before = path.read_bytes()
    second = ledger.append(path, [record(1), record(0)])
    assert path.read_bytes() == before
    assert first.records == second.records
    assert not second.findings


def test_same_cell_same_values_is_one_row_and_other_values_are_kept_as_two(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    again = record(0, attempt_id="again", wall_seconds=9.0)
    assert len(ledger.append(path, [record(0), again]).records) == 1
    other = record(0, 4.0, attempt_id="other")
    assert len(ledger.append(path, [other]).records) == 2


def test_failed_attempts_are_all_kept(tmp_path: Path) -> None:
    failed = [record(0, None, attempt_id=str(n), error="x") for n in range(3)]
    assert len(ledger.append(tmp_path / "ledger.jsonl", failed).records) == 3


def test_an_edited_line_is_a_finding_and_the_others_still_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [record(0), record(1)])
    path.write_text(path.read_text().replace('"val_loss":5.0', '"val_loss":4.0', 1))
    held = ledger.read(path)
    assert len(held.records) == 1
    assert "ledger.jsonl line 1 was edited" in held.findings[0]


def test_a_record_edited_where_it_ran_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [record(0, attempt_id="a")])
    held = ledger.append(path, [record(0, 4.0, attempt_id="a")])
    assert "4.0 where it ran but 5.0 in the ledger" in held.findings[0]
    assert len(held.records) == 1


def test_a_line_of_a_later_version_is_refused_with_its_version(tmp_path: Path) -> None:
    content = json.loads(ledger.to_line(record()))
    content["schema_version"] = 3
    (tmp_path / "ledger.jsonl").write_text(json.dumps(content) + "\n")
    assert "schema_version 3" in ledger.read(tmp_path / "ledger.jsonl").findings[0]


def test_a_torn_last_line_is_found_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [record(0), record(1)])
    path.write_bytes(path.read_bytes()[:-40])
    held = ledger.append(path, [record(1), record(2)])
    assert sorted(r.seed for r in held.records) == [0, 1, 2]
    assert "line 2" in held.findings[0]
    assert sorted(r.seed for r in ledger.read(path).records) == [0, 1, 2]


def test_a_deleted_row_comes_back_from_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    path = tmp_path / "ledger.jsonl"
    git("init")
    ledger.append(path, [record(0), record(1)])
    git("add", path.name)
    git("commit", "-m", "two rows")
    path.write_text(ledger.to_line(record(1)) + "\n")
    git("commit", "-am", "hide one")
    held = ledger.append(path, [])
    assert sorted(r.seed for r in held.records) == [0, 1]
    assert "cell muon-0" in held.notes[0]
    assert "put back" in held.notes[0]
    assert not held.findings


def _append_many(path: Path, worker: int) -> None:
    for number in range(20):
        ledger.append(path, [record(worker * 100 + number)])


def test_eight_processes_append_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    processes = [multiprocessing.Process(target=_append_many, args=(path, worker)) for worker in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    held = ledger.read(path)
    assert not held.findings
    assert len(held.records) == len({r.seed for r in held.records}) == 160
