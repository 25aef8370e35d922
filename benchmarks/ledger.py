"""The ledger at scale: the commands that read it, and what verifying it costs over reading it.

    status, stats, index   seconds of `muon study status`, `python -m stages.stats` and `python -m stages.report` (which
                           ends in writing reports/README.md), start of Python included, with 1,000 and 10,000 records
    read                   `ledger.read` (hash and schema of every line) against `json.loads` of every line
    lost lines             `ledger.lost_lines` against the lines that `git log -p` shows as added

The repository is made for it, by `make_repository`: studies of 108 cells over shared baselines, records whose
digests are those of their cells, some failed attempts, curves of 10 points, and a git history that grew by
50 commits, some of them on a side branch that was merged. Nothing in it was trained: its losses are drawn.
The seconds of a command are its processor's (user and system), those of the programs it starts included.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from benchmarks.harness import Comparison, Row, per_call
from benchmarks.harness import run as measure
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, load_study, resolve_cell, resolved_arms
from muonlab.registry import ledger
from muonlab.registry.canonical import sha256_of
from muonlab.registry.record import RunRecord
from muonlab.registry.snapshot import Registration

PROJECT = Path(__file__).parents[1]
SIZES = (1_000, 10_000)
"""Records."""
SEEDS = 12
ROLES = {"challengers": 3, "control": 3, "reference": 2}
"""Arms of a study beside the baseline."""
ARMS = sum(ROLES.values())
A_STUDY = 100
"""Records for each study; it has a few cells more, but shares those of its baseline."""
A_WORKLOAD = 10
"""Studies on one workload: they share the baseline's runs."""
COMMITS = 50
STEPS, POINTS = 300, 10
GOALS = {"status": 2.0, "stats": 5.0, "index": 5.0}
"""Seconds of the whole command with 10,000 records."""
ROUNDS = 3


def make_repository(root: Path, records: int) -> str:
    """Make a committed repository with a ledger of so many records in `root`; return a study in it."""
    root.mkdir(parents=True)
    studies = [_study(number) for number in range(max(1, records // A_STUDY))]
    _declare(root, studies)
    layout = Layout(root, root)
    made = _attempts(layout, [study["slug"] for study in studies], records)
    _git(root, "init", "--quiet", "--initial-branch=main")
    _git(root, "config", "user.name", "n")
    _git(root, "config", "user.email", "n@example.org")
    _git(root, "config", "gc.auto", "0")
    (root / ".gitattributes").write_text("experiments/ledger.jsonl merge=union\n", encoding="utf-8")
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "declared")
    _grow(layout, made)
    return str(studies[0]["slug"])


def _study(number: int) -> dict[str, Any]:
    first = number % A_WORKLOAD * ARMS
    variants = iter([f"variant-{first + i}" for i in range(ARMS)])
    return {
        "slug": f"{number:03}-study",
        "question": "Is one of three variants better?",
        "workload": f"w{number // A_WORKLOAD}",
        "baseline": "muon",
        **{role: list(islice(variants, arms)) for role, arms in ROLES.items()},
        "seeds": list(range(SEEDS)),
        "decision": {"min_effect": "0.5%"},
        "price_usd_per_gpu_hour": 0,
        "budget_usd": 0,
    }


def _declare(root: Path, studies: list[dict[str, Any]]) -> None:
    """Write declarations, and the hashes that data preparation and fingerprinting would have left."""
    project = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    settings = project["workloads"]["tiny"]["settings"] | {"steps": STEPS, "eval_every": STEPS // (POINTS - 1)}
    variants = {f"variant-{i}": {"kind": "nolah", "scale": 0.5 + i / 100} for i in range(A_WORKLOAD * ARMS)}
    optimizers = {"muon": {"kind": "muon"}, **variants}
    workloads = sorted({study["workload"] for study in studies})
    params = {
        "optimizer": "muon",
        "seed": 0,
        "workload": workloads[0],
        "study": studies[0]["slug"],
        "optimizers": {name: {**options, "lr": 0.02} for name, options in optimizers.items()},
        "workloads": {name: {"settings": copy.deepcopy(settings)} for name in workloads},
    }
    files: dict[str, Any] = {
        "params.yaml": params,
        "dvc.yaml": {"stages": {}},
        **{f"experiments/{study['slug']}/study.yaml": {"study": study} for study in studies},
        **{
            f"data/{name}/meta.json": {"sha256": {"tokens": f"tokens of {name}", "tokenizer": "t"}}
            for name in workloads
        },
        **{f"data/fingerprint/{arm}.json": {"code": "c", "environment": "e"} for arm in optimizers},
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        dump = yaml.safe_dump if name.endswith(".yaml") else json.dumps
        path.write_text(dump(content), encoding="utf-8")


def _attempts(layout: Layout, slugs: list[str], records: int) -> list[RunRecord]:
    """Results of all cells, each study's in its own name, and as many failed attempts as are missing to `records`."""
    rng = np.random.default_rng(0)
    params = load_params(layout.params)
    made: dict[str, RunRecord] = {}
    for slug in slugs:
        study = load_study(layout, slug)
        arms = resolved_arms(params, study)
        registration = study.registration(arms)
        written = Registration(
            registration=registration,
            registered_at="2026-01-01T00:00:00+00:00",
            commit=None,
            declaration={"study": study.declaration(), **arms},
        )
        (layout.study(slug) / "registration.json").write_text(written.model_dump_json(indent=2) + "\n", "utf-8")
        for arm in study.arms:
            resolved = resolve_cell(layout, params, study.workload, arm, 0)
            for seed in study.seeds:
                digest = resolved.model_copy(update={"seed": seed}).digest
                if digest not in made:
                    made[digest] = _result(rng, slug, study.workload, arm, seed, digest, registration)
    results = list(made.values())
    failed = [_failed(rng, results[rng.integers(len(results))]) for _ in range(records - len(results))]
    mixed = [*results, *failed][:records]
    rng.shuffle(mixed)
    return mixed


def _result(
    rng: np.random.Generator, slug: str, workload: str, arm: str, seed: int, digest: str, registration: str
) -> RunRecord:
    loss = 5.3 + 0.02 * seed / SEEDS + 0.003 * rng.standard_normal()
    curve = [
        {"step": round(STEPS * i / (POINTS - 1)), "val_loss": loss + 2.3 * math.exp(-i / 2) * (POINTS - 1 - i) / POINTS}
        for i in range(POINTS)
    ]
    hashes = {name: sha256_of([name, workload, seed]) for name in ("init", "order")}
    shapes = ("256 x 64", "292 x 64", "32 x 64", "64 x 128", "64 x 64")
    return RunRecord.model_validate(
        {
            "study": slug, "workload": workload, "arm": arm, "seed": seed, "cell_digest": digest,
            "registration": registration, "status": "completed", "attempt": 1,
            "attempt_id": rng.bytes(8).hex(), "started_at": "2026-01-02T00:00:00+00:00", "resumed_from_step": 0,
            "val_loss": loss, "perplexity": math.exp(loss), "final_step": STEPS, "tokens": STEPS * 512,
            "wall_seconds": 20 + 10 * rng.random(), "device_count": 1, "cost_usd": 0.0, "curve": curve,
            "orthogonalizers": dict.fromkeys(shapes, "gram_eigh"),
            "hashes": {"data": f"tokens of {workload}", "tokenizer": "t", "code": "c", "environment": "e", **hashes,
                       "weights": sha256_of([digest, loss])},
            "provenance": {"commit": rng.bytes(20).hex(), "dirty": False, "python": "3.11.7", "torch": "2.13.0",
                           "transformers": "5.23.0", "device": "Processor", "host_os": "Linux 6"},
        }
    )  # fmt: skip


def _failed(rng: np.random.Generator, after: RunRecord) -> RunRecord:
    ended = {"status": "failed", "val_loss": None, "perplexity": None, "final_step": 30, "curve": [], "error": "killed"}
    hashes = after.hashes.model_copy(update={"weights": None})
    return after.model_copy(update={**ended, "attempt_id": rng.bytes(8).hex(), "hashes": hashes})


def _grow(layout: Layout, made: list[RunRecord]) -> None:
    """Commit the ledger piece by piece; every tenth piece on a branch of its own, which is merged."""
    lines = [ledger.to_line(record) + "\n" for record in made]
    size = math.ceil(len(lines) / COMMITS)
    pieces = [lines[at : at + size] for at in range(0, len(lines), size)]

    def commit(piece: list[str], message: str) -> None:
        with layout.ledger.open("a", encoding="utf-8") as file:
            file.writelines(piece)
        _git(layout.root, "add", "experiments/ledger.jsonl")
        _git(layout.root, "commit", "--quiet", "--message", message)

    for number, piece in enumerate(pieces):
        if number % 10 == 5:
            _git(layout.root, "switch", "--quiet", "--create", f"side-{number}", "HEAD~1")
            commit(piece, f"piece {number}, elsewhere")
            _git(layout.root, "switch", "--quiet", "main")
            _git(layout.root, "merge", "--quiet", "--message", f"merge {number}", f"side-{number}")
        else:
            commit(piece, f"piece {number}")


def _git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


# ---------------------------------------------------------------------- what is measured

COMMANDS = {
    "status": ("muon study status", ["-m", "muonlab.cli", "study", "status"]),
    "stats": ("stages.stats", ["-m", "stages.stats"]),
    "index": ("stages.report and the index", ["-m", "stages.report"]),
}


def commands() -> Iterator[Row]:
    """Seconds of whole commands."""
    for records in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "repository"
            slug = make_repository(root, records)
            judge_all(root, slug)
            for name, (what, command) in COMMANDS.items():
                seconds = [seconds_of(root, [*command, slug]) for _ in range(ROUNDS)]
                cpu, wall = (sorted(column) for column in zip(*seconds, strict=True))
                goal = GOALS[name] if records == SIZES[-1] else None
                note = f"on the clock: {wall[0]:.2f} to {wall[-1]:.2f} s"
                what_of = f"{what}, {records:,} records"
                yield Row(what_of, "", median(cpu), cpu[0], cpu[-1], "s", goal, at_least=False, note=note)


def judge_all(root: Path, slug: str) -> None:
    """Judge one study, and let all others have its verdict under their own names: the index reads nothing else."""
    layout = Layout(root, root)
    for stage in ("stages.collect", "stages.stats"):
        seconds_of(root, ["-m", stage, slug, *([slug] if stage == "stages.collect" else [])])
    verdict = (layout.reports(slug) / "verdict.json").read_text(encoding="utf-8")
    for path in (root / "experiments").glob("*/study.yaml"):
        other = layout.reports(path.parent.name)
        other.mkdir(exist_ok=True)
        (other / "verdict.json").write_text(verdict.replace(slug, path.parent.name), encoding="utf-8")


def seconds_of(root: Path, command: list[str]) -> tuple[float, float]:
    """Seconds of the processor, and on the clock, of a Python command in a repository."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "MUONLAB_TRACKING": "off"}
    # A user's Python compiles a module once, not in every command.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{command} exited with {done.returncode}: {done.stderr.decode()[-500:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def reading() -> Iterator[Row]:
    """Reading with all that is verified, against the least that any reader does."""
    for records in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "repository"
            make_repository(root, records)
            path = Layout(root, root).ledger
            content = path.read_bytes()
            yield _noted(
                Comparison(
                    f"ledger.read, {records:,} records",
                    ours=partial(ledger.read, path),
                    peer=partial(_plain_read, path),
                    peer_name="json.loads a line",
                    rounds=ROUNDS,
                    note="Hash and schema of every record are verified; the peer verifies nothing.",
                )
            )
            yield _noted(
                Comparison(
                    f"lost lines, {records:,} records, {COMMITS} commits",
                    ours=partial(ledger.lost_lines, path, content),
                    peer=partial(_plain_history, path),
                    peer_name="git log -p",
                    rounds=ROUNDS,
                    clock=_clock_with_children,
                    note="The peer leaves out what a merge has dropped.",
                )
            )


def _noted(comparison: Comparison) -> Row:
    row = measure(comparison)
    return replace(row, note=f"{row.note} {per_call(row)}.")


def _plain_read(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _plain_history(path: Path) -> set[bytes]:
    command = ["git", "log", "--reverse", "--format=", "-p", "--unified=0", "--no-color", "--", path.name]
    shown = subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    return {line[1:] for line in shown.split(b"\n") if line.startswith(b"+{")} - set(path.read_bytes().split(b"\n"))


def _clock_with_children() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"commands": commands, "reading": reading}
