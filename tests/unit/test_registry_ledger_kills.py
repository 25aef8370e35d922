"""A process that dies in the middle of an append loses its own row at most, and glues nothing to anybody's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_registry_ledger import record

from muonlab.registry import ledger

WRITER = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_registry_ledger import record
from muonlab.registry import ledger
path, first, limit = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for seed in range(first, first + 1000):
    ledger.append(path, [record(seed, error="x" * 20000, loss=None)])
    print(seed, flush=True)
"""


def start(path: Path, first: int, limit: int = 0) -> subprocess.Popen[str]:
    """A process that appends rows of 20 kB from seed `first` on, and dies when the file has `limit` bytes."""
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(path), str(first), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def written(process: subprocess.Popen[str]) -> list[int]:
    """Seeds of the rows that a process has appended before it ended."""
    assert process.stdout is not None
    with process, process.stdout as said:
        return [int(line) for line in said.read().splitlines()]


def test_a_row_whose_writer_was_killed_in_its_middle_stands_apart_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [record(0)])
    # The system ends the process by a signal in the middle of a write: what kill -9 does when it comes then.
    process = start(path, 100, limit=path.stat().st_size + 50_000)
    assert written(process) == [100, 101]
    assert process.returncode == -signal.SIGXFSZ
    assert not path.read_bytes().endswith(b"\n")
    held = ledger.append(path, [record(102, None, error="x"), record(1)])
    for found in (held, ledger.read(path)):
        assert sorted(r.seed for r in found.records) == [0, 1, 100, 101, 102]
        (finding,) = found.findings
        assert finding.startswith("ledger.jsonl line 4 is not a ledger line: it is cut short")
        assert "then the line can be deleted" in finding
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[4:]]))
    assert ledger.read(path).findings == []


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, [record(0)])
    before = path.read_bytes()
    script = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_registry_ledger import record; from muonlab.registry import ledger\n"
        "path = Path(sys.argv[2]); limit = path.stat().st_size + 500\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "ledger.append(path, [record(1)])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(path)], capture_output=True)
    assert b"File too large" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.slow
def test_eight_processes_append_while_some_are_killed_and_no_row_is_lost_or_torn(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rng = random.Random(0)
    workers = [start(path, 10_000 * number) for number in range(1, 9)]
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 400_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(rng.random() / 20)
    said = {seed for worker in workers for seed in written(worker)}
    held = ledger.append(path, [record(1)])
    kept = {r.seed for r in held.records}
    assert len(said) >= 10
    # A row may stand whose writer was killed before it could say so.
    assert said | {1} <= kept
    assert len(kept - said) <= 1 + len(workers)
    lines = path.read_bytes().splitlines()
    assert len(lines) == len(held.records) + len(held.findings)
    assert len(held.findings) <= len(workers)
