"""Laws of attempts that are made elsewhere: what is promoted, what is kept beside it, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reporting_studies import digest, record

from muonlab.pipeline.attempts import BUNDLE_FILES, AttemptProgress, CellScratch, Purpose
from muonlab.pipeline.fences import Fence, fences_of, inherit, open_fence, promote, record_lost, reserve
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.running import is_training, running
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.files import file_sha256
from muonlab.registry.record import RunRecord

CELL = digest("muon", 0)
JOB = {"cell": "a cell", "purpose": "a purpose"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(root=tmp_path, main=tmp_path)


def begin(fence: Fence, *, progress: AttemptProgress | None = None) -> None:
    """What a node writes when it begins."""
    fence.attempt.mkdir(parents=True)
    base = record("muon", 0, 5.0, attempt=fence.number, attempt_id=f"{fence.number:016x}").model_dump(mode="json")
    told = ("status", "val_loss", "perplexity", "resumed_from_step", "final_step", "tokens", "wall_seconds",
            "cost_usd", "curve", "orthogonalizers", "computing", "error")  # fmt: skip
    start = {"record": {name: value for name, value in base.items() if name not in told},
             "purpose": vars(Purpose("001-made-up", None, 3.6)), "pid": 1,
             "cell": {"settings": {"steps": 300}}}  # fmt: skip
    (fence.attempt / "start.json").write_text(json.dumps(start))
    if progress is not None:
        (fence.attempt / "progress.json").write_text(json.dumps(progress._asdict()))


def finish(fence: Fence, loss: float = 5.0) -> RunRecord:
    """What a node has left when it is done."""
    if not fence.attempt.exists():
        begin(fence)
    made = record("muon", 0, loss, attempt=fence.number, attempt_id=f"{fence.number:016x}")
    (fence.attempt / "record.json").write_text(made.model_dump_json())
    fence.scratch.bundle.mkdir(parents=True)
    for name in BUNDLE_FILES:
        (fence.scratch.bundle / name).write_text(f"{name} of {fence.number}")
    (fence.scratch.bundle / "train.json").write_text(made.model_dump_json())
    hashes = {name: file_sha256(fence.scratch.bundle / name) for name in BUNDLE_FILES}
    (fence.scratch.bundle / "manifest.json").write_text(json.dumps(hashes))
    return made


def checkpoint(work: Path, step: int) -> None:
    (work / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (work / "checkpoints" / f"step-{step:06d}" / "weights").write_text(str(step))


def test_no_number_is_given_twice(layout: Layout) -> None:
    first = reserve(layout, CELL, JOB)
    begin(first)
    record_lost(layout, first, "gone")
    second = reserve(layout, CELL, JOB)
    finish(second)
    promote(layout, second)
    (CellScratch(layout, CELL).folder / "attempts" / "5").mkdir()
    third, fourth = reserve(layout, CELL, JOB), reserve(layout, CELL, JOB, above=9)
    assert [fence.number for fence in (first, second, third, fourth)] == [1, 2, 6, 10]
    assert third.job() != fourth.job(), "a token tells them apart"


def test_nothing_behind_a_fence_is_a_result_before_it_is_promoted(layout: Layout) -> None:
    fence, own = reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    made = finish(fence)
    assert own.finished() is None
    assert own.records() == []
    assert promote(layout, fence) == made
    assert own.finished() == made
    assert own.records() == [made]
    assert not fence.folder.exists()
    assert promote(layout, fence) is None, "again, it does nothing"


def test_a_promotion_that_was_cut_off_is_completed(layout: Layout) -> None:
    fence, own = reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    made = finish(fence)
    fence.scratch.bundle.rename(own.bundle)  # killed after its first step
    assert promote(layout, fence) == made
    assert own.finished() == made
    assert own.records() == [made]


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_bundle_that_is_not_what_training_wrote_is_not_promoted(layout: Layout, name: str) -> None:
    fence, own = reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    finish(fence)
    with (fence.scratch.bundle / name).open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match="not the file that training wrote"):
        promote(layout, fence)
    assert own.finished() is None
    assert own.records() == []


def test_the_record_of_another_cell_is_not_promoted(layout: Layout) -> None:
    fence = reserve(layout, digest("nolah", 0), JOB)
    finish(fence)
    with pytest.raises(IntegrityError, match="not that of the attempt"):
        promote(layout, fence)


def test_what_comes_second_is_kept_beside_the_first(layout: Layout) -> None:
    first, second, own = reserve(layout, CELL, JOB), reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    begin(first, progress=AttemptProgress(40, 300, 6.0, 36.0, 1, 0))
    lost = record_lost(layout, first, "its node died")
    assert lost is not None
    assert (lost.status, lost.final_step, lost.cost_usd) == ("abandoned", 40, pytest.approx(0.036))
    assert record_lost(layout, first, "its node died") is None, "once"
    made = finish(second)
    promote(layout, second)
    # The node was only cut off: its attempt goes on, and ends otherwise.
    late = finish(first, loss=4.9)
    assert promote(layout, first) == late
    assert own.finished() == made, "the first result stays"
    assert own.records() == [lost, made, late]
    assert len({held.attempt_id for held in own.records()}) == 3


def test_a_late_finisher_takes_the_number_of_no_attempt_that_still_runs(layout: Layout) -> None:
    first, second, own = reserve(layout, CELL, JOB), reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    for fence in (first, second):
        begin(fence, progress=AttemptProgress(40, 300, 6.0, 36.0, 1, 0))
    lost = record_lost(layout, first, "its node died")
    late = finish(first)
    promote(layout, first)
    also_lost = record_lost(layout, second, "its node died")
    assert also_lost is not None, "what it has cost is kept"
    assert own.records() == [lost, also_lost, late]


def test_an_attempt_that_is_known_from_hearing_alone_is_recorded(layout: Layout) -> None:
    heard, fence = reserve(layout, CELL, JOB), reserve(layout, CELL, JOB)
    begin(heard, progress=AttemptProgress(40, 300, 6.0, 36.0, 1, 0))
    seen = heard.seen()
    assert seen is not None
    fence.note(seen, "node-7")
    lost = record_lost(layout, fence, "its node died", status="failed")
    assert lost is not None
    assert (lost.status, lost.final_step, lost.wall_seconds) == ("failed", 40, 36.0)
    assert record_lost(layout, reserve(layout, CELL, JOB), "it never began") is None


def test_what_a_driver_hears_of_a_node_is_shown_while_it_holds_the_cell(layout: Layout) -> None:
    lost, heard, fence = (reserve(layout, CELL, JOB) for _ in range(3))
    for each in (lost, heard):
        begin(each, progress=AttemptProgress(40, 300, 6.0, 36.0, 1, 0))
    record_lost(layout, lost, "its node died")
    seen = heard.seen()
    assert seen is not None
    shutil.rmtree(heard.folder)
    fence.note(seen, "node-7")
    assert running(layout, gpu=False).cells == [], "nobody watches it"
    with CellScratch(layout, CELL).locked("muon-0"):
        (cell,) = running(layout, gpu=False).cells
        assert (cell.node, cell.step, cell.steps, cell.seconds) == ("node-7", 40, 300, 36.0)
        assert "muon-0 on tiny, on node-7: step 40/300" in cell.line()
        assert is_training(layout, CELL)
        finish(fence)
        promote(layout, fence)
        assert running(layout, gpu=False).cells == []


def test_a_lost_attempt_is_charged_until_its_last_sign_of_life(layout: Layout) -> None:
    loading, stepping = reserve(layout, CELL, JOB), reserve(layout, CELL, JOB)
    begin(loading)
    begin(stepping, progress=AttemptProgress(40, 300, 6.0, 36.0, 1, 0))
    for fence in (loading, stepping):
        (fence.attempt / "alive.json").write_text(json.dumps({"seconds": 90.0}))
        heard = fence.seen()
        assert heard is not None
        fence.note(heard, "node-7")
    shutil.rmtree(stepping.attempt)  # it lay on the node
    for fence, step in ((loading, 0), (stepping, 40)):
        lost = record_lost(layout, fence, "its node died")
        assert lost is not None
        assert (lost.final_step, lost.wall_seconds, lost.cost_usd) == (step, 90.0, pytest.approx(0.09))


def test_an_attempt_goes_on_from_the_furthest_checkpoint_of_any_other(layout: Layout) -> None:
    own = CellScratch(layout, CELL)
    assert inherit(layout, reserve(layout, CELL, JOB)) == 0
    checkpoint(own.work, 20)
    ahead = reserve(layout, CELL, JOB)
    for step in (30, 40):
        checkpoint(ahead.scratch.work, step)
    (ahead.scratch.work / "checkpoints" / "step-000050.part").mkdir()
    fence = reserve(layout, CELL, JOB)
    assert inherit(layout, fence) == 40
    shutil.rmtree(ahead.scratch.work)  # whoever wrote them may drop them
    assert (fence.scratch.work / "checkpoints" / "step-000040" / "weights").read_text() == "40"
    assert not (fence.scratch.work / "checkpoints" / "step-000050.part").exists()


def test_a_failed_attempts_checkpoints_become_the_cells(layout: Layout) -> None:
    fence, own = reserve(layout, CELL, JOB), CellScratch(layout, CELL)
    begin(fence)
    checkpoint(fence.scratch.work, 10)
    failed = record("muon", 0, "failed", attempt=fence.number)
    (fence.attempt / "record.json").write_text(failed.model_dump_json())
    assert promote(layout, fence) == failed
    assert (own.work / "checkpoints" / "step-000010").exists()


def test_a_node_knows_its_drivers_folder_by_the_token(layout: Layout, tmp_path: Path) -> None:
    fence, elsewhere = reserve(layout, CELL, JOB), Layout(root=tmp_path / "node", main=tmp_path / "node")
    text = fence.job()
    assert text is not None
    assert open_fence(layout, CELL, fence.number, text)[1], "shared"
    there, shared = open_fence(elsewhere, CELL, fence.number, text)
    assert not shared
    assert there.job() == text
    with pytest.raises(UsageError, match="another driver's attempt"):
        open_fence(elsewhere, CELL, fence.number, text.replace("token", "token "))
    CellScratch(layout, CELL).discard()
    assert fences_of(layout, CELL) == []
