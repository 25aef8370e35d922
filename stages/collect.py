"""Stage `collect`: bring the ledger up to date and snapshot one study's part of it."""

from __future__ import annotations

from muonlab.pipeline.conclude import collect_into
from muonlab.pipeline.layout import Layout
from stages._main import run_stage


def main(slug: str, place: str) -> None:
    """Write reports/<place>/registry.json for the study `slug`; `place` is its slug, or `exp` for the one cell."""
    collect_into(Layout.find(), slug, place)


if __name__ == "__main__":
    run_stage(main, "STUDY", "PLACE")
