"""Stage `collect`: bring the ledger up to date and snapshot one study's part of it."""

from __future__ import annotations

from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import keep_snapshot
from muonlab.pipeline.layout import Layout
from stages._main import run_stage


def main(slug: str, place: str) -> None:
    """Write reports/<place>/registry.json for the study `slug`; `place` is its slug, or `exp` for the one cell."""
    layout = Layout.find()
    keep_snapshot(layout, collect(layout, slug), place)


if __name__ == "__main__":
    run_stage(main, "STUDY", "PLACE")
