"""Kill a study at random moments until it is done, and compare it with one that nobody disturbed.

    python tests/chaos/chaos.py [--kills 50] [--seed 0] [--arms 3] [--seeds 4] [--steps 1000] [--aimed 0.7] [--tracking]

Two clones of one toy repository (the tests' own: a Mamba2 and attention model of a few thousand weights) run the same
study. In the first, `muon study run` is left alone. In the second, SIGKILL hits the driver, a worker or dvc at random
moments. Moments on the clock would nearly all fall into the seconds in which libraries are loaded, or after the last
cell. So of the kills

    aimed        (--aimed, 0.7 of them) fall while a cell steps, when the study as a whole has made a number of steps
                 that is drawn uniformly from all that it has to make: one after the other, however fast the machine is
    anywhere     half of the others, each among the aimed ones: a random wait (--wait) after a start, whatever it is at
    concluding   the rest, when all cells are trained: a random wait after dvc was seen to run a stage

What has ended is started again, by `muon study run` or by `dvc repro` of the grid, and at the last by a
`muon study run` that is left alone. Then must hold:

    the verdicts, the final weights' files and every result of the ledger are those of the calm study, bit for bit
    every cell has one result, and every killed attempt its line, with what it cost
    at no look, ten a second, did a file that claims to be whole fail to parse, and no command told of a damaged one
    after the death of a driver all it had started was gone within seconds, and nothing runs at the end

Exit code 0 when all of it holds, 1 when not. The times of the kills are those of a real machine: the same seed draws
the same waits and victims' kinds, not the same moments of the study.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from conftest import STUDY, TOY_PARAMS, TOY_STUDY, Repository, make_repository

from muonlab.tracking.process import lives

GRID = f"experiments/{STUDY}/dvc.yaml"
DOORS = {
    "muon study run": ["-m", "muonlab.cli", "study", "run", "-j", "2"],
    "dvc repro": ["-m", "dvc", "repro", GRID],
}
SHARE_OF_MUON = 0.75
"""Of the starts; the others are by dvc, which trains one cell at a time."""
GONE_WITHIN_S = 15.0
LOOK_EVERY_S = 0.1
LONGEST_START_S = 180.0
ARMS = {"muon": {}, "nolah": {"scale": 0.90}, "orthonoise": {}, "isotropic": {}}
TOLD_OF_DAMAGE = ("Traceback", "is passed over", "is not the file that training wrote", "JSONDecodeError", "was edited",
                  "is not a record that training wrote", "INVALID")  # fmt: skip
"""What a command says when it has read something half-written, or has not foreseen it."""


def main() -> int:
    """Run both studies, print what happened, return the exit code."""
    options = _options()
    print(f"chaos: {options.kills} kills, seed {options.seed}, {options.arms} arms x {options.seeds} seeds of "
          f"{options.steps} steps; {os.cpu_count()} cores, {sys.platform}")  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="muonlab-chaos-"))
    problems = ["it did not come to its end"]
    try:
        calm, hit = (replace(clone, tracking=options.tracking) for clone in make_clones(folder, options))
        began = time.monotonic()
        done = calm.muon("study", "run", "-j", "2", check=False)
        calm_seconds = time.monotonic() - began
        print(f"undisturbed: exit {done.returncode} after {calm_seconds:.0f} s")
        rng = random.Random(options.seed)
        storm = Storm(hit, rng, options)
        began = time.monotonic()
        with storm.log.open("ab") as log:
            storm.strike(plan_of(rng, options), log, until=began + 60 * options.minutes)
        last = hit.muon("study", "run", "-j", "2", check=False)
        hit_seconds = time.monotonic() - began
        print(f"disturbed: exit {last.returncode} after {hit_seconds:.0f} s, {storm.starts} starts")
        problems = [*storm.problems, *compare(calm, hit, storm, last)]
        if options.tracking:
            problems += tracking_problems(hit)
        print_summary(calm, hit, storm)
    finally:
        if options.keep or problems:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for problem in problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    print("chaos: " + ("FAILED" if problems else "the same verdicts, weights and results as undisturbed"))
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", type=int, default=3, choices=range(2, len(ARMS) + 1))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000, help="of a cell; 75 take about a second on one core")
    parser.add_argument("--wait", type=float, default=3.0, help="mean seconds that a kill not aimed waits, exponential")
    parser.add_argument("--aimed", type=float, default=0.7, help="share of the kills that hit a cell at its steps")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="no kill later than so long after the first start"
    )
    parser.add_argument("--tracking", action="store_true", help="with MLflow, whose store is then checked too")
    parser.add_argument("--keep", action="store_true", help="leave the two clones where they are, also when all holds")
    return parser.parse_args()


def make_clones(folder: Path, options: argparse.Namespace) -> Iterator[Repository]:
    """Two clones of one repository with the study declared; each prepares its own data."""
    params, study = copy.deepcopy(TOY_PARAMS), copy.deepcopy(TOY_STUDY)
    arms = list(ARMS)[: options.arms]
    params["optimizers"] = {arm: {"kind": arm, "orthogonalizer": "gram_eigh", **ARMS[arm]} for arm in arms}
    workload = params["workloads"]["toy"]
    workload["tuned"] = {arm: {"lr": 0.02} for arm in arms}
    workload["settings"] |= {"steps": options.steps, "checkpoint_every": 10, "eval_every": max(1, options.steps // 20)}
    study |= {"challengers": arms[1:], "seeds": list(range(options.seeds)), "price_usd_per_gpu_hour": 1.0,
              "budget_usd": 100.0}  # fmt: skip
    origin = make_repository(folder / "origin", params=params, study=study)
    for name in ("calm", "hit"):
        origin.git("clone", "-q", str(origin.root), str(folder / name))
        clone = Repository(folder / name)
        clone.git("config", "user.name", "n")
        clone.git("config", "user.email", "n@example.org")
        yield clone


@dataclass(frozen=True)
class Moment:
    """When a kill is to fall."""

    kind: str
    """`aimed`, `anywhere` or `concluding`."""
    steps: int
    """How many the study must have made, of all its cells together."""


def steps_of(options: argparse.Namespace) -> int:
    """All that the study has to make."""
    return int(options.arms * options.seeds * options.steps)


def plan_of(rng: random.Random, options: argparse.Namespace) -> list[Moment]:
    """The moments of all kills, in order."""
    steps = steps_of(options)
    aimed = round(options.aimed * options.kills)
    anywhere = (options.kills - aimed) // 2
    moments = [
        Moment(kind, rng.randrange(steps))
        for kind, number in (("aimed", aimed), ("anywhere", anywhere))
        for _ in range(number)
    ]
    concluding = [Moment("concluding", steps)] * (options.kills - aimed - anywhere)
    return [*sorted(moments, key=lambda moment: moment.steps), *concluding]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: whom it hit, by which door the study was being run, and what the study was doing."""

    victim: str
    door: str
    phase: str
    stepping: bool


class Storm:
    """Runs a study again and again, and kills."""

    def __init__(self, repository: Repository, rng: random.Random, options: argparse.Namespace) -> None:
        self.repository, self.rng, self.wait_s = repository, rng, options.wait
        self.steps = steps_of(options)
        self.log = repository.root.parent / "said.log"
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.starts = 0
        self.looks = 0

    def strike(self, moments: list[Moment], log: Any, *, until: float) -> None:
        """Kill once at each moment that comes before `until`; each time, what had ended by then is started again."""
        print("kill  at [s]  victim  door            what the study was doing")
        began = time.monotonic()
        driver: subprocess.Popen[bytes] | None = None
        door = ""
        left = list(moments)
        while left and time.monotonic() < until:
            moment = left[0]
            wait_s = self.rng.expovariate(1 / self.wait_s)
            kind = self.rng.choice(("driver", "worker", "dvc"))
            if driver is None or driver.poll() is not None:
                door = "muon study run" if self.rng.random() < SHARE_OF_MUON else "dvc repro"
                driver = self.start(door, log)
            self.watch(LONGEST_START_S, until=functools.partial(self.has_come, moment))
            if moment.kind != "aimed":
                self.watch(wait_s)
            elif not self.stepping():
                if self.steps_made() >= self.steps:  # the last cell ended before its last steps were seen
                    left[0] = replace(moment, kind="concluding")
                continue
            if driver.poll() is not None:
                continue  # it ended by itself (done, or a cell's worker died three times): start again, then kill
            victims = self.victims(driver)
            victim = self.rng.choice(victims.get(kind) or victims["driver"])
            name = next(name for name, found in victims.items() if victim in found)
            if victim == driver.pid and door == "dvc repro":
                name = "dvc"
            kill = Kill(name, door, self.phase(), stepping=bool(self.stepping()))
            self.kills.append(kill)
            print(f"{len(self.kills):>4}  {time.monotonic() - began:>6.1f}  {name:<6}  {door:<14}  {kill.phase}",
                  flush=True)  # fmt: skip
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                self.kills.pop()  # it ended in this instant
                continue
            left.pop(0)
            if name != "worker" or door != "muon study run":
                self.end_of(driver)
        if driver is not None and driver.poll() is None:
            driver.kill()
            self.end_of(driver)

    def start(self, door: str, log: Any) -> subprocess.Popen[bytes]:
        self.starts += 1
        root = self.repository.root
        # What `muon study run` does before it calls dvc; dvc alone makes no folders.
        for arm in self.repository.read("params.yaml")["optimizers"]:
            for seed in self.repository.read(f"experiments/{STUDY}/study.yaml")["study"]["seeds"]:
                (root / "runs" / STUDY / f"{arm}-{seed}").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, *DOORS[door]], cwd=root, env=self.repository.environment(),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def victims(self, driver: subprocess.Popen[bytes]) -> dict[str, list[int]]:
        """Processes of the repository by what they are; the driver is always among them."""
        found: dict[str, list[int]] = {"driver": [driver.pid], "worker": [], "dvc": []}
        for process in processes_in(self.repository.root):
            line = command_of(process)
            if process.pid != driver.pid and ("muonlab.pipeline.worker" in line or "stages.train" in line):
                if not line.startswith(("/bin/sh", "sh ")):
                    found["worker"].append(process.pid)
            elif (" dvc " in line or "dvc_child" in line) and "stages." not in line and process.pid != driver.pid:
                found["dvc"].append(process.pid)
        if "dvc" in " ".join(str(part) for part in driver.args):  # type: ignore[union-attr]
            found["dvc"].append(driver.pid)
            found["driver"] = [driver.pid]
        return found

    def end_of(self, driver: subprocess.Popen[bytes]) -> None:
        """Wait for the death of a driver that was hit, or whose dvc or stage was, and of all that it had started."""
        until = time.monotonic() + GONE_WITHIN_S
        while time.monotonic() < until and (driver.poll() is None or list(processes_in(self.repository.root))):
            time.sleep(LOOK_EVERY_S)
        left = [command_of(process) for process in processes_in(self.repository.root)]
        if left:
            self.problems.append(f"kill {len(self.kills)}: {GONE_WITHIN_S:g} s later there still ran {left}")
            for process in processes_in(self.repository.root):
                process.kill()
            driver.wait()

    def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait so long or until something is so, reading every file that claims to be whole."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            found = list(half_written(self.repository))
            self.problems += [f"before kill {len(self.kills) + 1}: {text}" for text in found]
            self.looks += 1
            time.sleep(LOOK_EVERY_S)

    def has_come(self, moment: Moment) -> bool:
        """Whether it is time for a kill, or for the wait before it; or nothing runs."""
        lines = [command_of(process) for process in processes_in(self.repository.root)]
        if not lines or moment.kind == "anywhere":
            return True
        if moment.kind == "concluding":
            return any("stages." in line and "stages.train" not in line for line in lines)
        made = self.steps_made()
        return made >= self.steps or (made >= moment.steps and bool(self.stepping()))

    def steps_made(self) -> int:
        """Of all cells together; of each, those of the attempt that came farthest."""
        farthest: Counter[Path] = Counter()
        for path in self.repository.root.glob("scratch/*/attempts/*/progress.json"):
            cell = path.parents[2]
            farthest[cell] = max(farthest[cell], json.loads(path.read_text())["step"])
        return farthest.total()

    def stepping(self) -> list[str]:
        """The cells that are being trained, each with its step."""
        found = []
        for path in sorted(self.repository.root.glob("scratch/*/attempts/*/progress.json")):
            if not path.with_name("record.json").exists():
                progress, start = json.loads(path.read_text()), json.loads(path.with_name("start.json").read_text())
                if lives(start):
                    found.append(f"{start['record']['arm']}-{start['record']['seed']} at step {progress['step']}")
        return found

    def phase(self) -> str:
        """What the study was doing, as far as its files and processes tell."""
        root = self.repository.root
        lines = [command_of(process) for process in processes_in(root)]
        done = {path.parent.parent.name for path in root.glob("scratch/*/bundle/manifest.json")}
        for path in root.glob(f"runs/{STUDY}/*/train.json"):
            done.add(json.loads(path.read_text())["cell_digest"])
        stages = {part for line in lines for part in line.split() if part.startswith("stages.")}
        if any("pipeline.worker" in line for line in lines):
            stages.add("workers")
        what = ", ".join(self.stepping() or sorted(stages)) or (
            "dvc" if any(" dvc" in line for line in lines) else "its start"
        )
        return f"{len(done)} cells done; {what}"


def processes_in(root: Path) -> Iterator[psutil.Process]:
    """Living processes whose working folder lies in the repository."""
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(process.info["cwd"]).startswith(str(root)):
            yield process


def command_of(process: psutil.Process) -> str:
    """Its command line; empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def half_written(repository: Repository) -> Iterator[str]:
    """Files that a reader may open at any moment, and that do not parse."""
    root = repository.root
    patterns = ("scratch/*/attempts/*/*.json", "scratch/*/bundle/*.json", f"runs/{STUDY}/*/train.json",
                f"reports/{STUDY}/*.json", f"experiments/{STUDY}/registration.json", "data/toy/meta.json",
                "data/fingerprint/*.json")  # fmt: skip
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue  # replaced or dropped since the folder was listed
        try:
            json.loads(text)
        except ValueError:
            yield f"{path.relative_to(root)} held {len(text)} characters that do not parse"


def compare(calm: Repository, hit: Repository, storm: Storm, last: subprocess.CompletedProcess[str]) -> Iterator[str]:
    """Each difference between the two studies that there should not be."""
    if last.returncode != 0:
        yield f"the last run exited with {last.returncode}: {last.stderr[-2000:]}"
    left = [command_of(process) for process in processes_in(hit.root)]
    if left:
        yield f"at the end there still ran {left}"
    if not verdict_of(calm):
        yield "the undisturbed study has no verdict to compare with"
    for key in ("complete", "amended", "verdicts"):
        ours, theirs = (unpriced(verdict_of(repository).get(key)) for repository in (calm, hit))
        if ours != theirs:
            yield f"verdict.json: {key} is {theirs}, undisturbed {ours}"
    if (ours := weights_of(calm)) != (theirs := weights_of(hit)):
        yield f"weights differ: {sorted(ours.items() ^ theirs.items())}"
    if (ours := results_of(calm)) != (theirs := results_of(hit)):
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        yield f"the ledger's results differ in {differing}"
    rows = hit.ledger()
    for digest, count in Counter(row["cell_digest"] for row in rows if row["status"] == "completed").items():
        if count != 1:
            yield f"cell {digest[:12]} has {count} results in the ledger"
    if others := {row["status"] for row in rows} - {"completed", "abandoned"}:
        yield f"the ledger has attempts that ended as {sorted(others)}"
    if lost := begun(hit) - {row["attempt_id"] for row in rows} - repeated(hit):
        yield f"attempts that the ledger does not have: {sorted(lost)}"
    if any(row["status"] == "abandoned" and row["wall_seconds"] > 0 and row["cost_usd"] <= 0 for row in rows):
        yield "an attempt took time and cost nothing"
    said = storm.log.read_text(errors="replace") + last.stdout + last.stderr
    for words in TOLD_OF_DAMAGE:
        if words in said:
            line = next(line for line in said.splitlines() if words in line)
            yield f"a command said {words!r}: {line[:300]}"


def begun(repository: Repository) -> set[str]:
    """Ids of all attempts that were begun."""
    paths = repository.root.glob("scratch/*/attempts/*/start.json")
    return {json.loads(path.read_text())["record"]["attempt_id"] for path in paths}


def repeated(repository: Repository) -> set[str]:
    """Attempts that ended with the outcome that their cell had already: the ledger keeps the first."""
    held = {(row["cell_digest"], row["val_loss"]) for row in repository.ledger() if row["status"] == "completed"}
    return {row["attempt_id"] for row in repository.attempts() if (row["cell_digest"], row["val_loss"]) in held}


def verdict_of(repository: Repository) -> dict[str, Any]:
    """Its verdict.json; empty where there is none."""
    path = f"reports/{STUDY}/verdict.json"
    found: dict[str, Any] = repository.read(path) if (repository.root / path).exists() else {}
    return found


def unpriced(verdicts: Any) -> Any:
    """Verdicts without the price of the next pairs, which follows from the attempts' times."""
    if not isinstance(verdicts, dict):
        return verdicts
    return {arm: {k: v for k, v in found.items() if k != "next_cost_usd"} for arm, found in verdicts.items()}


def weights_of(repository: Repository) -> dict[str, str]:
    """SHA-256 of every cell's file of final weights."""
    paths = repository.root.glob(f"runs/{STUDY}/*/model.safetensors")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def results_of(repository: Repository) -> dict[str, dict[str, Any]]:
    """The ledger's results by cell: all that a repetition must reproduce, the curve included."""
    keys = ("status", "cell_digest", "registration", "val_loss", "perplexity", "final_step", "tokens", "curve",
            "orthogonalizers", "hashes")  # fmt: skip
    return {
        f"{row['arm']}-{row['seed']}": {key: row[key] for key in keys}
        for row in repository.ledger()
        if row["status"] != "abandoned"
    }


def tracking_problems(repository: Repository) -> Iterator[str]:
    """Whether MLflow has one run an attempt, and none that says it runs."""
    import sqlite3

    with closing(sqlite3.connect(repository.root / "mlflow.db")) as store:
        runs = store.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid WHERE t.key = 'attempt_id'"
        ).fetchall()
    made = begun(repository)
    if sorted(attempt for attempt, _ in runs) != sorted(made):
        yield f"MLflow has {len(runs)} runs of attempts, {len(made)} attempts were begun"
    if statuses := {status for _, status in runs} - {"FINISHED", "KILLED"}:
        yield f"MLflow has runs that are {sorted(statuses)}"


def print_summary(calm: Repository, hit: Repository, storm: Storm) -> None:
    """The table of what both did."""
    for title in ("victim", "door"):
        counts = Counter(getattr(kill, title) for kill in storm.kills)
        print(f"kills by {title}: {', '.join(f'{name} {number}' for name, number in sorted(counts.items()))}")
    stepping = sum(kill.stepping for kill in storm.kills)
    stages = sum("stages." in kill.phase for kill in storm.kills)
    print(f"kills while a cell stepped: {stepping}; while dvc ran another stage: {stages}; "
          f"looks at all files: {storm.looks}\n")  # fmt: skip
    calm_rows, hit_rows = calm.ledger(), hit.ledger()
    print(f"{'':<34}{'undisturbed':>15}{'disturbed':>15}")
    for name, of in COUNTS.items():
        print(f"{name:<34}{of(calm_rows):>15}{of(hit_rows):>15}")
    verdicts = [verdict_of(repository).get("verdicts", {}) for repository in (calm, hit)]
    for arm in verdicts[0]:
        ours, theirs = (found.get(arm, {}).get("verdict", "none") for found in verdicts)
        print(f"{'verdict on ' + arm:<34}{ours:>15}{theirs:>15}")


def _seconds(rows: list[dict[str, Any]]) -> int:
    return round(sum(row["wall_seconds"] for row in rows))


def _of(rows: list[dict[str, Any]], status: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] == status]


COUNTS: dict[str, Callable[[list[dict[str, Any]]], int]] = {
    "cells with a result": lambda rows: len(_of(rows, "completed")),
    "attempts in the ledger": len,
    "of these abandoned": lambda rows: len(_of(rows, "abandoned")),
    "results that were resumed": lambda rows: sum(row["resumed_from_step"] > 0 for row in _of(rows, "completed")),
    "seconds charged": _seconds,
    "of these to abandoned attempts": lambda rows: _seconds(_of(rows, "abandoned")),
}


if __name__ == "__main__":
    sys.exit(main())
