"""Stage `evaluate` of the one-cell pipeline: score the saved weights and write the row of `dvc exp show`."""

from __future__ import annotations

import json

from muonlab.pipeline.cells import CURRENT
from muonlab.pipeline.conclude import mark
from muonlab.pipeline.evaluations import evaluate_folders, read_record
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import find_workload, load_params
from muonlab.registry.errors import IntegrityError
from stages._main import run_stage


def main(workload: str, arm: str, seed: str) -> None:
    """Write metrics.json; raise IntegrityError when the folder holds another cell or other weights."""
    layout = Layout.find()
    folder = layout.runs(CURRENT) / "current"
    record = read_record(folder)
    if record is None or (record.workload, record.arm, str(record.seed)) != (workload, arm, seed):
        found = f"{record.workload} {record.arm}-{record.seed}" if record else "nothing"
        raise IntegrityError(
            f"runs/exp/current: found {found}, expected {workload} {arm}-{seed}; run `dvc repro train`."
        )
    settings = find_workload(load_params(layout.params), workload).settings
    (scored,) = evaluate_folders(layout, [folder], settings, layout.data(workload), workers=1)
    if record.val_loss is not None and not scored.agrees_with(record.val_loss):
        raise IntegrityError(
            f"runs/exp/current: the weights score {scored.val_loss} nats/token, train.json says {record.val_loss}; "
            "one of the two was edited."
        )
    metrics = {
        "val_loss": scored.val_loss,
        "perplexity": scored.perplexity,
        "cost_usd": round(record.cost_usd, 4),
        "seconds": round(record.wall_seconds, 1),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    mark(folder, ".evaluated")


if __name__ == "__main__":
    run_stage(main, "WORKLOAD", "OPTIMIZER", "SEED")
