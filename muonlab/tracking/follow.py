"""The process that copies attempts to MLflow while they run: `python -m muonlab.tracking.follow <repository>`.

It looks every two seconds until its standard input closes or its parent dies, then makes one last pass, reports
included; every quarter of a minute it reads what the training processes use. It imports mlflow when there is
something to copy, and not before. With `--once` it makes that last pass only, and exits with 1 when something could
not be copied; with `--all` the pass takes the ledger along and asks the store also where the markers promise that
nothing is missing; with `--rebuild` it forgets the markers first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from muonlab.registry.parent import end_with_parent
from muonlab.tracking import pending
from muonlab.tracking.markers import forget, running_attempts, tracking_uri, unsynced_attempts
from muonlab.tracking.process import EVERY_S, Sampler
from muonlab.tracking.sync import Mirror

POLL_S = 2.0
LAST_PASS_S = 10.0
"""The process ends this long after it was told to, whatever it waits for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow the repository named on the command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m muonlab.tracking.follow")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--once", action="store_true", help="copy what MLflow lacks, and end")
    parser.add_argument("--all", action="store_true", help="with --once: the ledger too")
    parser.add_argument("--rebuild", action="store_true", help="with --once: everything, whatever the markers say")
    options = parser.parse_args(arguments)
    if (options.all or options.rebuild) and not options.once:
        parser.error("--all and --rebuild go with --once.")
    stop = threading.Event()
    _stop_on_sigterm_or_death_of_parent(stop)
    if options.once:
        stop.set()
    else:
        os.nice(10)  # it shares the cores with the training that it watches
        _on_a_thread(_wait_for_end_of_input, stop)
    if options.rebuild:
        forget(options.repository)
    everything = options.all or options.rebuild
    return _follow(options.repository, tracking_uri(options.repository), stop, everything=everything)


def _follow(repository: Path, uri: str, stop: threading.Event, *, everything: bool) -> int:
    mirror, sampler = Mirror(repository, uri), Sampler()
    told: list[str] = []
    sampled = 0.0
    while True:
        last = stop.wait(POLL_S)
        if not last and time.monotonic() - sampled >= EVERY_S:
            sampled = time.monotonic()
            sampler.sample(running_attempts(repository))
        # The cheap look first: until there is something to copy, no memory and time go to importing mlflow.
        problems = []
        if everything or (pending(repository) if last else unsynced_attempts(repository, uri, settled=mirror.settled)):
            problems = mirror.sync(reports=last, ledger=everything)
        if problems and problems != told:
            for problem in problems:
                print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {problem}", flush=True)
        told = problems
        if last:
            return 1 if problems else 0


def _stop_on_sigterm_or_death_of_parent(stop: threading.Event) -> None:
    """Set `stop` on SIGTERM, which is also what the system sends when the parent dies (Linux).

    A thread waits for the signal: a handler would run inside `Event.wait`, whose lock `Event.set` needs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _on_a_thread(lambda: signal.sigwait({signal.SIGTERM}), stop)
    end_with_parent(signal.SIGTERM)


def _wait_for_end_of_input() -> None:
    while sys.stdin.buffer.read(1):
        pass


def _on_a_thread(wait: Callable[[], object], stop: threading.Event) -> None:
    """On a thread: wait, set `stop`, and end the process if it is still there after `LAST_PASS_S`."""

    def run() -> None:
        wait()
        stop.set()
        time.sleep(LAST_PASS_S)
        os._exit(1)

    threading.Thread(target=run, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
