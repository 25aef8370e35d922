"""What this machine and this clone have, what they lack, and the command that mends it.

A check is `ok`, a `note` (studies run, but something is worth knowing) or a `problem` (they do not, or their results
could not be kept). The speed is measured: `TIMED_STEPS` steps of the tiny model with params.yaml's optimizer, on random
tokens, since neither the data nor a study need be there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Literal, NamedTuple

from muonlab.pipeline import merging
from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.gpus import accelerator
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import git_state, processor
from muonlab.pipeline.resolve import load_params, resolve_optimizer
from muonlab.registry.errors import MuonlabError
from muonlab.registry.settings import Params
from muonlab.tracking.markers import sqlite_file, tracking_uri, without_credentials

TIMED_STEPS = 5
LITTLE_GB, LEAST_GB = 10.0, 1.0
SERVER_S = 3.0
"""The longest that a tracking server may take to answer."""

State = Literal["ok", "note", "problem"]


class Check(Facts):
    """One thing that was looked at."""

    name: str
    state: State
    """`ok`, `note` or `problem`."""
    found: str
    """What is there, as a phrase."""
    fix: str | None = None
    """The command that mends it; null where nothing need be, or no command does."""
    automatic: bool = False
    """Whether `muon doctor --fix` runs that command."""


class Doctor(Answer):
    """What `muon doctor` found."""

    checks: list[Check]
    usable: bool
    """No check is a problem."""
    seconds_per_step: float | None
    """Of the tiny model, median of a few steps; null where it could not be trained."""
    exit_code: int
    """0 where usable, else 1."""

    def lines(self) -> Iterator[str]:
        """One line a check, and below it the command that mends it."""
        marks: dict[State, str] = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            yield f"{marks[check.state]}  {check.name:<{width}}  {check.found}"
            if check.fix is not None:
                yield f"{'':7}  {'':{width}}  -> {check.fix}"
        if self.usable:
            yield "Usable."
        else:
            mended = any(check.automatic for check in self.checks if check.state == "problem")
            yield "Not usable yet" + ("; `muon doctor --fix` runs the commands it can." if mended else ".")


def examine(layout: Layout) -> Doctor:
    """Look at everything; changes nothing but the few seconds that it takes."""
    checks = [
        Check(name="python", state="ok", found=f"{platform.python_version()}, {sys.executable}"),
        _packages(layout),
        _torch(),
        _gpu(),
        _disk(layout),
        _git(layout),
        _identity(layout, "user.name", "muonlab"),
        _identity(layout, "user.email", "muonlab@localhost"),
        *_merging(layout),
        *_dvc(layout),
        _mlflow(layout),
    ]
    seconds: float | None = None
    try:
        params = load_params(layout.params)
    except MuonlabError as error:
        checks.append(Check(name="params.yaml", state="problem", found=str(error)))
    else:
        checks.append(_data(layout, params))
        speed = _speed(params)
        seconds = speed.seconds
        checks.append(speed.check)
    usable = all(check.state != "problem" for check in checks)
    return Doctor(checks=checks, usable=usable, seconds_per_step=seconds, exit_code=0 if usable else 1)


def mend(layout: Layout, found: Doctor, say: Callable[[str], None]) -> Doctor:
    """Run the commands that doctor may run by itself, and look again."""
    commands = [check.fix for check in found.checks if check.automatic and check.fix is not None]
    for command in commands:
        say(f"$ {command}")
        # What a command prints is no answer of this one.
        done = subprocess.run(shlex.split(command), cwd=layout.root, stdout=sys.stderr, check=False)
        if done.returncode != 0:
            say(f"muon: `{command}` exited with {done.returncode}.")
    importlib.invalidate_caches()
    return examine(layout) if commands else found


def _install(layout: Layout) -> str:
    constraints = ["-c", "constraints.txt"] if (layout.root / "constraints.txt").exists() else []
    if constraints and accelerator() == "none" and (layout.root / "constraints-cpu.txt").exists():
        constraints += ["-c", "constraints-cpu.txt"]
    return shlex.join([sys.executable, "-m", "pip", "install", *constraints, "-e", "."])


def _packages(layout: Layout) -> Check:
    """The packages of pyproject.toml, in the versions that it asks for."""
    from packaging.requirements import Requirement

    path = layout.root / "pyproject.toml"
    if not path.exists():
        return Check(name="packages", state="note", found="no pyproject.toml here that says which are needed")
    wanted = [Requirement(text) for text in tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]]
    wrong = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} is needed")
    if wrong:
        return Check(name="packages", state="problem", found="; ".join(wrong), fix=_install(layout), automatic=True)
    return Check(name="packages", state="ok", found=f"all {len(wanted)} in the versions that pyproject.toml asks for")


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check(name="torch", state="problem", found=f"cannot be imported ({error})")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__.partition('+')[0]}, built for {build}"
    if accelerator() != "none" and not torch.cuda.is_available():
        again = shlex.join([sys.executable, "-m", "pip", "install", "--force-reinstall", "torch"])
        return Check(name="torch", state="note", found=f"{found}, which does not reach the GPU", fix=again)
    return Check(name="torch", state="ok", found=found)


def _gpu() -> Check:
    name = accelerator()
    if name == "none":
        cores = os.cpu_count() or 1
        return Check(name="gpu", state="ok", found=f"none; the processor is {processor()}, {cores} cores")
    return Check(name="gpu", state="ok", found=name)


def _disk(layout: Layout) -> Check:
    free = shutil.disk_usage(layout.main).free / 1e9
    state: State = "problem" if free < LEAST_GB else "note" if free < LITTLE_GB else "ok"
    # No command is named: `dvc gc` reads .dvcignore and deletes the cells of every study that is closed.
    return Check(name="disk", state=state, found=f"{free:.1f} GB free at {layout.main}")


def _git(layout: Layout) -> Check:
    commit, dirty = git_state(layout.main)
    if commit is None:
        found = "no git repository with a commit; a registration is only worth what its history shows"
        return Check(name="git", state="problem", found=found)
    found = f"commit {commit[:12]}"
    if dirty:
        return Check(name="git", state="note", found=f"{found}, with code that is not committed; runs record that")
    return Check(name="git", state="ok", found=f"{found}, code as committed")


def _identity(layout: Layout, key: str, default: str) -> Check:
    asked = subprocess.run(["git", "config", key], cwd=layout.main, capture_output=True, text=True, check=False)
    if value := asked.stdout.strip():
        return Check(name=f"git {key}", state="ok", found=value)
    found = "not set; `dvc exp run` commits every experiment and needs it"
    return Check(name=f"git {key}", state="problem", found=found, fix=f"git config {key} {default}", automatic=True)


def _merging(layout: Layout) -> Iterator[Check]:
    """Whether git merges here what .gitattributes leaves to muonlab."""
    path = layout.root / ".gitattributes"
    if not path.exists() or "merge=muonlab" not in path.read_text(encoding="utf-8"):
        return
    if merging.is_set_up(layout.main):
        yield Check(name="git merge", state="ok", found="results of two clones are merged by muonlab")
        return
    found = "git does not know how to merge the results of two clones; a pull may leave conflicts"
    fix = shlex.join([sys.executable, "-m", "muonlab.pipeline.merging"])
    yield Check(name="git merge", state="note", found=found, fix=fix, automatic=True)


def _dvc(layout: Layout) -> list[Check]:
    try:
        from dvc.config import Config
    except ImportError as error:
        return [Check(name="dvc", state="problem", found=f"cannot be imported ({error})")]
    version = importlib.metadata.version("dvc")
    folder = layout.root / ".dvc"
    if not folder.is_dir():
        found = f"{version}, but no .dvc folder here"
        return [Check(name="dvc", state="problem", found=found, fix=_dvc_command("init"), automatic=True)]
    here = Check(name="dvc", state="ok", found=version)
    if remotes := list(Config(str(folder))["remote"]):
        return [here, Check(name="dvc remote", state="ok", found=", ".join(remotes))]
    found = "none; outputs of runs stay on this machine (ledger and reports go by git)"
    return [here, Check(name="dvc remote", state="note", found=found, fix="dvc remote add -d NAME ADDRESS")]


def _dvc_command(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "dvc", *arguments])


def _mlflow(layout: Layout) -> Check:
    uri = tracking_uri(layout.main)
    shown = without_credentials(uri)
    unset = "unset MLFLOW_TRACKING_URI"
    file = sqlite_file(layout.main, uri)
    if file is not None:
        if not file.exists():
            return Check(name="mlflow", state="ok", found=f"{shown}, to be made by the first run")
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
                (runs,) = store.execute("select count(*) from runs").fetchone()
        except sqlite3.Error as error:
            aside = shlex.join(["mv", str(file), f"{file}.broken"])
            return Check(name="mlflow", state="note", found=f"{shown} cannot be read ({error})", fix=aside)
        return Check(name="mlflow", state="ok", found=f"{shown}, {runs} runs")
    if not re.match(r"https?://", uri):
        return Check(name="mlflow", state="note", found=f"{shown}: not a store that is looked at here", fix=unset)
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=SERVER_S):  # noqa: S310 - http, checked above
            pass
    except urllib.error.HTTPError as answer:  # it answers, and wants to know who asks
        return Check(name="mlflow", state="ok", found=f"{shown} answers (status {answer.code})")
    except (OSError, ValueError) as error:
        found = f"{shown} does not answer ({error}); runs go on, and are copied there at the next start"
        return Check(name="mlflow", state="note", found=found, fix=unset)
    return Check(name="mlflow", state="ok", found=f"{shown} answers")


def _data(layout: Layout, params: Params) -> Check:
    name = f"data of {params.workload}"
    if (layout.data(params.workload) / "meta.json").exists():
        return Check(name=name, state="ok", found=f"prepared in data/{params.workload}")
    prepare = _dvc_command("repro", f"data/dvc.yaml:prepare_data@{params.workload}")
    found = "not prepared yet; the first run does it"
    return Check(name=name, state="note", found=found, fix=prepare, automatic=True)


class _Speed(NamedTuple):
    check: Check
    seconds: float | None


def _speed(params: Params) -> _Speed:
    workload = "tiny" if "tiny" in params.workloads else params.workload
    name = f"speed of {workload}"
    try:
        seconds = seconds_per_step(params, workload, params.optimizer)
    except (ImportError, OSError, RuntimeError, ValueError, MuonlabError) as error:
        found = f"no step could be made ({type(error).__name__}: {error})"
        return _Speed(Check(name=name, state="problem", found=found), None)
    steps = params.workloads[workload].settings.steps
    found = (
        f"{1000 * seconds:.0f} ms a step with {params.optimizer} on the processor, one thread: a run of {steps} steps "
        f"takes about {seconds * steps:.0f} s beside its evaluations"
    )
    return _Speed(Check(name=name, state="ok", found=found), seconds)


def seconds_per_step(params: Params, workload: str, arm: str) -> float:
    """Median seconds of a training step on this machine, after one that is not counted."""
    import torch

    import optim
    from muonlab.training import model as models

    settings = params.workloads[workload].settings
    spec = resolve_optimizer(params, workload, arm)
    torch.set_num_threads(1)  # as the trainer does
    shape = (settings.batch_size, settings.data.sequence_length + 1)
    tokens = torch.randint(settings.data.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    model = models.build(settings, seed=0)
    optimizer = optim.build(spec.kind, model, seed=0, **{**spec.options, "diagnose_every": 0})
    times = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        models.mean_loss(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
