"""Stage `stats`: judge a study from its snapshot and the evaluations of its weights."""

from __future__ import annotations

from muonlab.pipeline.conclude import judge_into
from muonlab.pipeline.layout import Layout
from stages._main import run_stage


def main(place: str) -> None:
    """Write stats.json and verdict.json in reports/<place>."""
    judge_into(Layout.find(), place)


if __name__ == "__main__":
    run_stage(main, "PLACE")
