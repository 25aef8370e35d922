"""A worker of the pool: trains the cells that it is given on standard input, one after another.

One JSON object a line in, {"cell": ..., "purpose": ..., "fence": ...}; one out, {"status": ..., "seconds": ...}.
Training prints nothing else on standard output. Torch is imported once for all cells. With the name of a file the jobs
are read from it: under torchrun by every process, of which the first answers.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType

from muonlab.pipeline.attempts import CellHeldError, CellScratch, Purpose, train_cell
from muonlab.pipeline.cells import follow
from muonlab.pipeline.evaluations import evaluate_now
from muonlab.pipeline.fingerprint import code_fingerprint
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import die_with_parent
from muonlab.registry.cell import Cell
from muonlab.registry.errors import MuonlabError, UsageError
from muonlab.registry.files import full_disk_told
from muonlab.training.distributed import started_ranks


def main() -> None:
    """Serve jobs until standard input, or the file, ends."""
    die_with_parent(int(sys.argv[1]))
    # The driver decides when to stop: Ctrl-C reaches the whole group, and a TERM is the driver's word.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    layout = Layout.find()
    answers = sys.stdout
    sys.stdout = sys.stderr
    jobs = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines() if len(sys.argv) > 2 else sys.stdin
    for line in jobs:
        job = json.loads(line)
        cell = Cell.model_validate(job["cell"])
        fence = job["fence"]
        place = layout if fence is None else Layout(root=layout.root, main=Path(fence["main"]))
        if not started_ranks().writes:
            if _is_by_this_code(place, cell):
                follow(place, cell)
            continue
        ending = _train(place, cell, Purpose(**job["purpose"]), None if fence is None else fence["number"])
        print(json.dumps(ending), file=answers, flush=True)


def _train(layout: Layout, cell: Cell, purpose: Purpose, number: int | None) -> dict[str, object]:
    scratch = CellScratch(layout, cell.digest)
    try:
        data_dir = layout.data(cell.workload)
        record = scratch.finished()
        if record is None and not _is_by_this_code(layout, cell):
            raise UsageError(
                f"cell {cell.key} ({cell.digest[:12]}): the code in {layout.root} is no longer the one that the run "
                "began with, which the record would name; check out that commit, or start the run again."
            )
        with full_disk_told():
            record = record or train_cell(
                layout,
                cell,
                purpose,
                data_dir=data_dir,
                number=number,
                warn=lambda text: print(f"{cell.key}: {text}", file=sys.stderr, flush=True),
            )
            evaluate_now(layout, scratch.bundle, cell.settings, record, data_dir)
    except CellHeldError:
        return {"status": "held", "seconds": 0.0}
    except MuonlabError as error:
        records = scratch.records()
        return {
            "status": "failed",
            "error": str(error),
            "seconds": records[-1].wall_seconds if records else 0.0,
        }
    return {"status": record.status, "seconds": record.wall_seconds}


def _is_by_this_code(layout: Layout, cell: Cell) -> bool:
    """Whether the checkout has the code that the cell's record will name: hours may lie between the two."""
    return code_fingerprint(layout.root, cell.optimizer.kind) == cell.inputs.code


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
