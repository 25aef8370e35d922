"""Stage `report`: render a study's standing, and show it to MLflow."""

from __future__ import annotations

from muonlab.pipeline.conclude import report_into
from muonlab.pipeline.layout import Layout
from stages._main import run_stage


def main(place: str) -> None:
    """Write report.md, report.html and figures/ in reports/<place>."""
    report_into(Layout.find(), place)


if __name__ == "__main__":
    run_stage(main, "PLACE")
