"""Stage `evaluate` of a study: score the saved weights of every cell of its grid."""

from __future__ import annotations

from muonlab.pipeline.conclude import evaluate_into
from muonlab.pipeline.layout import Layout
from stages._main import run_stage


def main(slug: str) -> None:
    """Write reports/<study>/evaluations.jsonl, one line a cell that has run."""
    evaluate_into(Layout.find(), slug)


if __name__ == "__main__":
    run_stage(main, "STUDY")
