"""Stage `evaluate` of a study: score the saved weights of every cell of its grid."""

from __future__ import annotations

import os

from muonlab.pipeline.evaluations import evaluate_folders
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import find_workload, load_params, load_study
from muonlab.registry.files import write_atomically
from stages._main import run_stage


def main(slug: str) -> None:
    """Write reports/<study>/evaluations.jsonl, one line a cell that has run."""
    layout = Layout.find()
    study = load_study(layout, slug)
    settings = find_workload(load_params(layout.params), study.workload).settings
    folders = [layout.runs(slug) / f"{arm}-{seed}" for seed in study.seeds for arm in study.arms]
    lines = evaluate_folders(
        layout, folders, settings, layout.data(study.workload), workers=min(4, os.cpu_count() or 1)
    )
    path = layout.reports(slug) / "evaluations.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line.model_dump_json() + "\n" for line in lines))


if __name__ == "__main__":
    run_stage(main, "STUDY")
