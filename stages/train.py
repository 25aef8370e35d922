"""Stage `train`: one cell in the current folder, adopted if it was trained already, else trained here."""

from __future__ import annotations

from pathlib import Path

from muonlab.pipeline.cells import CURRENT, adopt_or_train
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_reported, load_params, parse_seed
from stages._main import run_stage


def main(workload: str, arm: str, seed: str) -> None:
    """Write train.json, curve.csv, model.safetensors and .done."""
    here = Path.cwd()
    layout = Layout.find(here)
    if here.parent == layout.runs(CURRENT):
        check_reported(layout, load_params(layout.params))
    adopt_or_train(layout, workload, arm, parse_seed(seed), into=here)


if __name__ == "__main__":
    run_stage(main, "WORKLOAD", "OPTIMIZER", "SEED")
