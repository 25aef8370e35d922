"""Training processes that never outlive who started them, and the facts about this process that a record keeps."""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from muonlab.registry.parent import end_with_parent
from muonlab.registry.record import Provenance


def die_with_parent(parent: int | None = None) -> None:
    """Arrange that this process ends when its parent dies, even by SIGKILL (Linux only).

    With the number of the process that started it, it also ends now where that has died already.
    """
    end_with_parent(signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


PARENT = "MUONLAB_PARENT"
"""The number of the process that starts a stage as one of several, for `die_with_ancestors`."""


def die_with_ancestors(poll_s: float = 0.5) -> None:
    """End this process when its parent or the dvc process above it dies.

    DVC starts a stage through a shell: when dvc is killed the shell lives on, so the parent's death alone does
    not tell. A thread watches the whole line of ancestors up to dvc; polling costs microseconds.
    """
    parent = os.environ.get(PARENT)
    die_with_parent(None if parent is None else int(parent))
    watched: list[psutil.Process] = []
    try:
        for ancestor in psutil.Process().parents():
            watched.append(ancestor)
            if "dvc" in " ".join(ancestor.cmdline()[:3]):
                break
        else:
            if "DVC_ROOT" in os.environ:  # dvc started this and died before it could be watched
                os.kill(os.getpid(), signal.SIGKILL)
            watched = watched[:1]  # not under dvc: the shell above is a person's
    except psutil.Error:
        return

    def watch() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def guarded() -> None:
        try:
            watch()
        except psutil.Error:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=guarded, daemon=True, name="watch-ancestors").start()


CODE_PATHS = ("optim", "muonlab", "stages", "pyproject.toml", "constraints.txt")
DECLARED_PATHS = ("params.yaml", "dvc.yaml", "data/dvc.yaml", ":(glob)experiments/*/study.yaml")
"""What declares: results, lock files and the files that are made from these (grids, .dvcignore) are not among them."""

ONE_CELL = ("optimizer", "seed", "workload", "study")
"""The keys of params.yaml that name the one cell of `dvc exp run`, which leaves them behind."""


PLAIN_DIFF = (
    "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--full-index", "--binary", "--relative",
    "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--inter-hunk-context=0", "--diff-algorithm=myers",
    "--indent-heuristic",
)  # fmt: skip
"""What git does by default, whatever a user's configuration says: the hash of a diff must not depend on it."""


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit that is checked out, and whether tracked code differs from it; nulls outside git."""
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        return commit, bool(_git(root, "status", "--porcelain", "--", *CODE_PATHS).strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


class Difference(NamedTuple):
    """How the tree differs from the commit that is checked out, in what can change or declare a run."""

    files: list[str]
    """Tracked ones that differ."""
    sha256: str | None
    """Of their `git diff HEAD`; null where none differs."""
    untracked: list[str]
    """Code that git does not know."""


def difference(root: Path) -> Difference:
    """What of code and declarations is not as committed; nothing outside git.

    Of the declarations counts what they say: not their layout and comments, not the one cell's keys in params.yaml and
    not the seeds of a sequential plan, which are no part of its declaration.
    """
    try:
        paths = (*CODE_PATHS, *DECLARED_PATHS)
        names = _names(_git(root, "diff", "HEAD", "--name-only", "-z", "--relative", "--", *paths))
        changes = {}
        for name in names:
            if name == "params.yaml" or name.startswith("experiments/"):
                changes[name] = _change_of_declaration(root, name)
            else:
                changes[name] = _git(root, "diff", "HEAD", *PLAIN_DIFF, "--", name)
        others = _names(_git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE_PATHS))
    except (OSError, subprocess.CalledProcessError):
        return Difference([], None, [])
    changed = {name: change for name, change in changes.items() if change}
    sha256 = hashlib.sha256(b"".join(changed.values())).hexdigest() if changed else None
    return Difference(list(changed), sha256, others)


def _names(told: bytes) -> list[str]:
    return [name for name in os.fsdecode(told).split("\0") if name]


def _change_of_declaration(root: Path, name: str) -> bytes:
    """The difference of what the file declares, as a diff of its plain YAML; nothing where it declares the same."""
    try:
        before = _git(root, "show", f"HEAD:./{name}")
    except subprocess.CalledProcessError:
        before = b""  # added, not committed yet
    path = root / name
    after = path.read_bytes() if path.exists() else b""
    lines = difflib.unified_diff(_declares(name, before), _declares(name, after), f"a/{name}", f"b/{name}")
    return "".join(lines).encode()


def _declares(name: str, text: bytes) -> list[str]:
    try:
        content: Any = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        return text.decode(errors="replace").splitlines(keepends=True)
    if not isinstance(content, dict):
        return []
    if name == "params.yaml":
        content = {key: value for key, value in content.items() if key not in ONE_CELL}
    study = content.get("study")
    decision = study.get("decision") if isinstance(study, dict) else None
    if isinstance(decision, dict) and decision.get("plan", "sequential") == "sequential":
        content = {**content, "study": {key: value for key, value in study.items() if key != "seeds"}}
    return yaml.safe_dump(content, sort_keys=False).splitlines(keepends=True)


MOST_NAMED = 6


def dirty_text(found: Difference) -> str | None:
    """What is not as committed and what records say of it, in a sentence; None where nothing is."""
    said = []
    if found.files:
        said.append(f"{_named(found.files)} not as committed")
    if found.untracked:
        said.append(f"{_named(found.untracked)} not in git")
    if not said:
        return None
    kept = "that the code is not as committed" if found.sha256 is None else f"the hash of the diff, {found.sha256[:12]}"
    return f"the tree is dirty: {' and '.join(said)}; every record of a run that is made now holds {kept}."


def _named(files: list[str]) -> str:
    from muonlab.reporting.wording import listed  # loads numpy, which no training process wants from here

    more = [f"{len(files) - MOST_NAMED} more"] if len(files) > MOST_NAMED else []
    return f"{listed([*files[:MOST_NAMED], *more])} {'is' if len(files) == 1 else 'are'}"


def provenance(root: Path) -> Provenance:
    """Commit, versions and machine of this process; imports nothing heavy."""
    import importlib.metadata

    commit, dirty = git_state(root)
    return Provenance(
        commit=commit,
        dirty=dirty,
        diff_sha256=difference(root).sha256,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        transformers=importlib.metadata.version("transformers"),
        device=device_name(),
        host_os=f"{platform.system()} {platform.release()}",
    )


def device_name() -> str:
    """The device that a training here runs on, as its record names it: the GPU, or the processor."""
    from muonlab.pipeline.gpus import training_accelerator

    gpu = training_accelerator()
    return gpu if gpu != "none" else processor()


def processor() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
