"""The statistics against what else could be used: the e-process, one verdict, the reading of a table of results.

    e-process    log E of 200,000 simulated studies at each of 10 looks (pairs 3 to 12), and the verdicts at those
                 looks, against a plain Python loop over studies and looks that calls scipy.special.stdtr
    verdict      `decide` on the protocol's worked examples G1 and G2, against deepsig's Almost Stochastic Order
                 with its defaults (1000 bootstrap iterations) on the same losses
    table        reading 20,000 rows of a CSV of results, after start-up

The loop does a part of the studies, and its time is scaled up. deepsig lives in a virtual environment of its own
under `build/bench`, made at the first run, and in a process of its own; the clock of that comparison is the sum of both
processes' processor time. Both verdicts stand side by side in the notes: they answer different questions.
Source of ASO: Dror, Shlomov and Reichart (2019), doi:10.18653/v1/P19-1266; deepsig: arXiv:2204.06815.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from scipy.special import stdtr

from benchmarks.harness import Clock, Comparison, Row, per_call
from benchmarks.harness import run as measure
from muonlab.stats import evidence
from muonlab.stats.decision import Decision, decide
from muonlab.stats.kernel import decide_moments
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample

Losses = list[float]

STUDIES, LOOKS, G = 200_000, range(3, 13), 2.0
LOOPED_STUDIES = 1000
LONG_LOOP_AGREES = 1e-9  # running sums against cumulative ones: rounding only

DEEPSIG = "deepsig==1.2.8"
DEEPSIG_VENV = Path("build/bench/deepsig-venv")
ASO_GOAL = 1000.0


def _losses(*x: int) -> Losses:
    """Losses as the protocol prints them: 2 + x * 1e-4 nats/token."""
    return [2 + 1e-4 * value for value in x]


GOLDEN = {
    "G1": (_losses(623, 641, 610, 635, 618), _losses(602, 637, 575, 624, 609)),
    "G2": (_losses(623, 641, 610, 635, 618, 629, 607, 644), _losses(498, 531, 477, 526, 489, 517, 502, 508)),
}
"""The protocol's worked examples: losses of the baseline, losses of the challenger."""
RULE = Rule(min_effect=0.5, min_effect_unit="percent")


# ---------------------------------------------------------------------- the e-process


def e_process() -> Iterator[Row]:
    """log E, and verdicts, of many studies at every look, from their differences [studies, pairs]."""
    d = np.random.default_rng(0).standard_normal((STUDIES, LOOKS[-1]))
    few = d[:LOOPED_STUDIES].tolist()
    gap = np.abs(vectorized_log_e(d[:LOOPED_STUDIES]) - np.array(plain_log_e(few))).max()
    if gap > LONG_LOOP_AGREES:
        raise AssertionError(f"the plain loop and evidence.log_e_value differ by {gap:.2g} in log E")
    for name, ours in (("log E", vectorized_log_e), ("verdicts", vectorized_verdicts)):
        plain = plain_log_e if name == "log E" else plain_verdicts
        row = measure(
            Comparison(
                f"{name}: {STUDIES:,} studies x {len(LOOKS)} looks",
                ours=partial(ours, d),
                peer=partial(plain, few),
                peer_name="plain Python loop",
                peer_share=LOOPED_STUDIES / STUDIES,
                rounds=5,
                note=f"The loop does {LOOPED_STUDIES:,} studies, scaled up.",
            )
        )
        yield row
        yield Row(
            f"{name}: {STUDIES:,} studies x {len(LOOKS)} looks, seconds",
            value=median(row.seconds["ours"]),
            low=min(row.seconds["ours"]),
            high=max(row.seconds["ours"]),
            unit="s",
        )


def _moments(d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n [looks], mean and sum of squared deviations [studies, looks] of d [studies, pairs]."""
    n = np.array(LOOKS)
    total, squares = d.cumsum(axis=1)[:, n - 1], (d * d).cumsum(axis=1)[:, n - 1]
    return n, total / n, squares - total**2 / n


def vectorized_log_e(d: np.ndarray) -> np.ndarray:
    """log E [studies, looks]."""
    return evidence.log_e_value(*_moments(d), G)


MARGIN = 0.5
LOOP_RULE = Rule(min_effect=MARGIN, min_effect_unit="nats", n_min=LOOKS[0], n_max=LOOKS[-1], amended=True, g=G)
"""Amended, so that only E decides: then the plain loop below is the whole procedure."""


def vectorized_verdicts(d: np.ndarray) -> np.ndarray:
    """Verdicts [studies, looks]."""
    n, mean, ss = (moment[..., np.newaxis] for moment in _moments(d))
    return decide_moments(n, mean, ss, MARGIN, LOOP_RULE, family_size=1).verdict[..., 0]


def _plain_moments(path: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    total = squares = 0.0
    for n, x in enumerate(path, start=1):
        total, squares = total + x, squares + x * x
        if n >= LOOKS[0]:
            yield n, total / n, squares - total * total / n


def _plain_one(n: int, mean: float, ss: float) -> float:
    rho = math.sqrt(n) * mean / math.sqrt(n * mean**2 + ss)
    c = rho**2 * n * G / (1 + n * G)
    quantile = math.copysign(math.sqrt(n * c / (1 - c)), rho)
    tail = math.log(stdtr(n, quantile))
    return math.log(2) - math.log1p(n * G) / 2 - n * math.log1p(-c) / 2 + tail


def plain_log_e(paths: Sequence[Sequence[float]]) -> list[list[float]]:
    """log E [studies, looks] by the formula of `muonlab.stats.evidence`, one number at a time."""
    return [[_plain_one(*moments) for moments in _plain_moments(path)] for path in paths]


def plain_verdicts(paths: Sequence[Sequence[float]]) -> list[list[str]]:
    """Verdicts [studies, looks] of an amended plan, one at a time."""
    limit = -math.log(LOOP_RULE.alpha)
    verdicts = []
    for path in paths:
        row = []
        for n, mean, ss in _plain_moments(path):
            a, b, c = (_plain_one(n, m, ss) >= limit for m in (mean, MARGIN - mean, mean + MARGIN))
            if a and mean >= MARGIN and not b:
                row.append("GO")
            elif b:
                row.append("EQUIVALENT" if c else "NO_GO")
            else:
                row.append("INCONCLUSIVE")
        verdicts.append(row)
    return verdicts


# ---------------------------------------------------------------------- one verdict


def verdicts() -> Iterator[Row]:
    """One complete verdict on each worked example, from losses to reasons, against one ASO test."""
    try:
        python = deepsig_python()
    except subprocess.CalledProcessError as failed:
        said = (failed.stderr or "").strip().splitlines()
        for name in GOLDEN:
            yield Row(
                f"verdict on {name}",
                f"{DEEPSIG} ASO",
                goal=ASO_GOAL,
                note=f"{DEEPSIG} could not be installed: {said[-1] if said else failed}",
            )
        return
    with subprocess.Popen(
        [python, Path(__file__).with_name("aso_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:

        def ask(baseline: Losses, challenger: Losses) -> dict[str, Any]:
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(json.dumps({"baseline": baseline, "challenger": challenger}), file=worker.stdin, flush=True)
            answer: dict[str, Any] = json.loads(worker.stdout.readline())
            return answer

        process = psutil.Process(worker.pid)

        def clock() -> float:
            return time.process_time() + sum(process.cpu_times()[:2])

        for name, (baseline, challenger) in GOLDEN.items():
            row = measure(
                Comparison(
                    f"verdict on {name}",
                    ours=_decider(baseline, challenger),
                    peer=partial(ask, baseline, challenger),
                    peer_name=f"{DEEPSIG} ASO",
                    goal=ASO_GOAL,
                    rounds=3,
                    setup=evidence.critical_t.cache_clear,  # a first verdict has no quantiles at hand
                    clock=clock,
                )
            )
            decision, aso = _decider(baseline, challenger)(), ask(baseline, challenger)
            said = "the challenger dominates (below 0.5)" if aso["eps_min"] < 0.5 else "no dominance shown"
            note = f"{per_call(row)}. Ours: {decision.verdict}, E {decision.e_improves:.4g}, min_effect 0.5%. "
            note += f"ASO: eps_min {aso['eps_min']:.3f} at confidence 0.95, {said}."
            yield replace(row, note=note)
        assert worker.stdin is not None
        worker.stdin.close()


def _decider(baseline: Losses, challenger: Losses) -> Callable[[], Decision]:
    return lambda: decide(PairedSample.of("challenger", baseline, challenger), RULE)


def deepsig_python() -> Path:
    """The interpreter of deepsig's own environment, made if it is not there. Raises CalledProcessError."""
    python = DEEPSIG_VENV / "bin/python"
    if not (DEEPSIG_VENV / DEEPSIG).exists():
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", "--clear", DEEPSIG_VENV],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", DEEPSIG],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
        (DEEPSIG_VENV / DEEPSIG).touch()  # whole
    return python


# ---------------------------------------------------------------------- reading results

ARMS, SEEDS, STEPS = 5, 10, 400  # 20,000 rows
READING_GOAL_S = 2.0


def reading() -> Iterator[Row]:
    """A CSV of 20,000 rows: read alone, and by the whole command less the time that `muon --help` takes."""
    from muonlab.analysis.table import read_results

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        write_results(path)
        read_results(path)  # warm
        seconds = [_timed(lambda: read_results(path)) for _ in range(5)]
        yield _seconds_row(f"read a CSV of {ARMS * SEEDS * STEPS:,} rows", seconds)
        muon = [sys.executable, "-m", "muonlab.cli"]
        options = ["--baseline", "arm0", "--challenger", "arm1", "--min-effect", "0.5%"]
        compare = [*muon, "compare", str(path), *options, "--json"]
        more = []
        for _ in range(5):
            whole = _timed(lambda: subprocess.run(compare, check=True, capture_output=True), children_seconds)
            start = _timed(lambda: subprocess.run([*muon, "--help"], check=True, capture_output=True), children_seconds)
            more.append(whole - start)
        yield _seconds_row("`muon compare` on it, less `muon --help`", more)


def write_results(path: Path) -> None:
    """Falling curves of ARMS x SEEDS runs with STEPS evaluations each, with noise of run and step."""
    rng = np.random.default_rng(0)
    rows = ["arm,seed,step,loss,status,cost_usd"]
    for arm in range(ARMS):
        for seed in range(SEEDS):
            offset = 0.01 * rng.standard_normal() - 0.02 * arm
            for step in range(1, STEPS + 1):
                loss = 3 + 4 / math.sqrt(step) + offset + 0.001 * rng.standard_normal()
                rows.append(f"arm{arm},{seed},{10 * step},{loss:.6f},completed,{0.01 * step:.2f}")
    path.write_text("\n".join(rows) + "\n")


def children_seconds() -> float:
    """Processor seconds of the processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _timed(call: Callable[[], object], clock: Clock = time.process_time) -> float:
    began = clock()
    call()
    return clock() - began


def _seconds_row(what: str, seconds: Sequence[float]) -> Row:
    return Row(
        what,
        value=median(seconds),
        low=min(seconds),
        high=max(seconds),
        unit="s",
        goal=READING_GOAL_S,
        at_least=False,
        seconds={"ours": list(seconds)},
    )


SECTIONS = {"e_process": e_process, "verdicts": verdicts, "reading": reading}
