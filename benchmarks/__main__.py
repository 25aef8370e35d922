"""Run suites, print the table, save it. Exits 0 whatever the ratios are: a benchmark is no test."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import harness

SUITES = {
    "optim": "benchmarks.optim_step",
    "stats": "benchmarks.stats",
    "ledger": "benchmarks.ledger",
    "train": "benchmarks.train",
    "data": "benchmarks.data",
    "cluster": "benchmarks.cluster",
}
FOLDER = Path("build/bench")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def measured(suite: str, only: str | None) -> Iterator[harness.Row]:
    """The rows of a suite, or of one of its sections. A section that fails is a row that says so."""
    sections = importlib.import_module(SUITES[suite]).SECTIONS
    for name, section in sections.items():
        if only not in (None, name):
            continue
        try:
            for row in section():
                yield replace(row, suite=suite)
        except Exception as failure:
            traceback.print_exc()
            note = f"The section failed: {type(failure).__name__}: {failure}"
            yield harness.Row(f"the rest of {suite}.{name}", note=note, suite=suite)


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="SUITE[.SECTION]", default="", help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"where the JSON goes; default: {FOLDER}")
    arguments = parser.parse_args()
    suite, _, section = arguments.only.partition(".")
    if suite and suite not in SUITES:
        parser.error(f"--only: suite {suite!r} is unknown; allowed: {', '.join(SUITES)}")

    os.environ.update(dict.fromkeys(THREADS, "1"))  # before numpy and torch are imported: BLAS reads them once
    if section and section not in (sections := importlib.import_module(SUITES[suite]).SECTIONS):
        parser.error(f"--only: section {section!r} is unknown; allowed: {', '.join(f'{suite}.{s}' for s in sections)}")
    import torch

    torch.set_num_threads(1)
    environment = harness.environment()
    print(f"{environment['cpu']}, one thread, torch {environment['torch']}, Python {environment['python']}, ", end="")
    print(f"load {environment['load_average']:.2f} at the start")
    rows = []
    for name in [suite] if suite else SUITES:
        for row in measured(name, section or None):
            rows.append(row)
            print(f"  {name}: {row.what}: {row.verdict}", file=sys.stderr, flush=True)
    print("\nratio > 1: ours is faster; median and range over rounds of ours, peer, ours, peer, ...")
    print("seconds are the processor's, unless a note says otherwise; met ~: the range contains the goal\n")
    print(harness.table(rows))
    print("\n" + harness.summary(rows))
    print(f"saved: {harness.save(rows, environment, arguments.out)}")


if __name__ == "__main__":
    main()
