"""DVC from the outside: a study's grid file, which studies are open, what can be restored, and `dvc repro`.

DVC reads every dvc.yaml of the repository for every command, so only open studies are shown to it: `.dvcignore`
hides all grids and then names the open ones. See docs/adr/0001-two-doors.md.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import CellsFailedError, UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.study import Study

HIDE_ALL = "experiments/*/dvc.yaml"


def grid_text(study: Study) -> str:
    """The dvc.yaml that stands for a study's grid."""
    import jinja2

    template = importlib.resources.files(__package__).joinpath("grid.yaml.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - YAML of checked names
    )
    return environment.from_string(template).render(study=study)


def write_grid(layout: Layout, study: Study) -> None:
    """Write a study's dvc.yaml where it differs from what its declaration asks for."""
    if not _grid_matches(layout, study):
        path = layout.study(study.slug) / "dvc.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)  # of a twin, which has no study.yaml, it may not be there
        write_atomically(path, grid_text(study), durable=False)


def check_grid(layout: Layout, study: Study) -> None:
    """Raise UsageError when a study's dvc.yaml is not what its declaration asks for."""
    if not _grid_matches(layout, study):
        raise UsageError(
            f"experiments/{study.slug}/dvc.yaml: it does not match study.yaml, which was changed; "
            f"`muon study run {study.slug}` makes it anew and runs what is missing."
        )


def _grid_matches(layout: Layout, study: Study) -> bool:
    path = layout.study(study.slug) / "dvc.yaml"
    return path.exists() and path.read_text(encoding="utf-8") == grid_text(study)


def make_folders(layout: Layout, study: Study) -> None:
    """Make the folders in which DVC runs the cells' stages; it does not make them itself."""
    for arm in study.arms:
        for seed in study.seeds:
            (layout.runs(study.slug) / f"{arm}-{seed}").mkdir(parents=True, exist_ok=True)


def open_studies(layout: Layout) -> list[str]:
    """Studies whose grid DVC reads."""
    path = layout.root / ".dvcignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.split("/")[1] for line in lines if line.startswith("!experiments/")]


def set_open_studies(layout: Layout, slugs: list[str]) -> None:
    """Show DVC the grids of these studies and hide all others; a study's results stay where they are."""
    path = layout.root / ".dvcignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line != HIDE_ALL and not line.startswith("!experiments/")]
    text = "\n".join([*kept, HIDE_ALL, *(f"!experiments/{slug}/dvc.yaml" for slug in slugs)]) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text, durable=False)


def dvc_environment(layout: Layout) -> dict[str, str]:
    """The environment in which DVC's stages find this interpreter and this tree's code."""
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": folder + os.pathsep + os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"}


def dvc(layout: Layout, *arguments: str, show: Callable[[str], bool] = lambda line: False) -> None:
    """Run a dvc command; lines of its output for which `show` is true are printed on stderr as they come.

    Raises CellsFailedError with the command's last words when it fails.
    """
    mend_rwlock(layout)
    process = subprocess.Popen(
        [sys.executable, "-m", "muonlab.pipeline.dvc_child", str(os.getpid()), *arguments],
        cwd=layout.root,
        env=dvc_environment(layout),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            if show(line):
                print(line.rstrip(), file=sys.stderr, flush=True)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        ours = [line for line in said if line.startswith("muonlab: ")]
        words = ours or [line for line in said if "ERROR" in line] or said[-3:]
        raise CellsFailedError(f"`dvc {' '.join(arguments)}` failed: {' '.join(words).removeprefix('muonlab: ')}")


CLOCKS_DIFFER_S = 60.0
"""At most, between the start of a process, which is counted from that of the machine, and the time of a file."""


def mend_rwlock(layout: Layout) -> None:
    """Mend DVC's note of who reads and writes what, where a kill has left one that no dvc gets past.

    DVC truncates the file before it writes it, under a lock of its own, and refuses what is no JSON; the next one makes
    it anew. And it takes an entry for a living process' as long as there is one of its number: one that nobody has
    waited for (the first process of many containers waits for none), or that got the number later.
    """
    path = layout.root / ".dvc" / "tmp" / "rwlock"
    if _without_the_dead(path) is None:
        return
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    hardlink = Config(str(layout.root / ".dvc"))["core"].get("hardlink_lock", False)
    guard = make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent), hardlink_lock=hardlink)
    # Where another dvc holds the guard for long, the dvc that is called next says so.
    with contextlib.suppress(LockError), guard:
        if (living := _without_the_dead(path)) == {}:
            path.unlink()
            _say_mended(layout.root, path)
        elif living is not None:
            write_atomically(path, json.dumps(living), durable=False)


def _without_the_dead(path: Path) -> dict[str, Any] | None:
    """What the note says of processes that live; empty where it is cut short, None where nothing is to be mended."""
    try:
        noted, written_at = json.loads(path.read_bytes()), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    try:
        reads, writes = noted.get("read", {}), noted.get("write", {})
        readers = {at: [by for by in some if _lives(by, written_at)] for at, some in reads.items()}
        living = {
            "read": {at: some for at, some in readers.items() if some},
            "write": {at: by for at, by in writes.items() if _lives(by, written_at)},
        }
    except (AttributeError, KeyError, TypeError):
        return None  # of another form: no kill makes that, and dvc says what it thinks of it
    return None if living == {"read": reads, "write": writes} else living


def _lives(noted: dict[str, Any], written_at: float) -> bool:
    """Whether the process that an entry names may be at work: no zombie, and none that began after the entry."""
    import psutil

    try:
        process = psutil.Process(noted["pid"])
        began_later = process.create_time() > written_at + CLOCKS_DIFFER_S
        return process.status() != psutil.STATUS_ZOMBIE and not began_later
    except psutil.NoSuchProcess:
        return False


def _mend_lock_files(repo: Any, layout: Layout) -> None:
    """Take back from git, or remove, each dvc.lock that a dvc has left empty or half written when it was killed.

    DVC writes it in place. What it knew is in DVC's run cache, from which the stages are restored. A conflict that a
    merge has left in one is for its reader to settle. Files that .dvcignore hides DVC does not read. The caller holds
    DVC's lock.
    """
    from dvc.dvcfile import Lockfile
    from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError

    root, seen = layout.root, [layout.study(slug) for slug in open_studies(layout)]
    for path in (folder / "dvc.lock" for folder in (root, root / "data", *seen)):
        try:
            Lockfile(repo, str(path)).load()
        except (YAMLSyntaxError, YAMLValidationError):
            if re.search(rb"^<<<<<<< ", path.read_bytes(), re.MULTILINE):
                continue
            os.replace(path, root / ".dvc" / "tmp" / f"{path.parent.name}-dvc.lock")
            subprocess.run(["git", "checkout", "-q", "--", str(path)], cwd=root, capture_output=True, check=False)
            _say_mended(root, path)


def _say_mended(root: Path, path: Path) -> None:
    how = "taken back from git" if path.exists() else "removed, and dvc makes it anew"
    print(f"muon: {path.relative_to(root)} was cut short when a dvc was killed; it is {how}.",
          file=sys.stderr, flush=True)  # fmt: skip


def cache_folder(layout: Layout) -> Path:
    """Where DVC keeps outputs by their hash."""
    from dvc.config import Config

    own = layout.root / ".dvc"
    return Path(Config(str(own))["cache"].get("dir", str(own / "cache")))


def shadow_dvc(layout: Layout, shadow: Layout) -> None:
    """Make `shadow`, a tree without git, a repository of DVC that reads the cache of `layout` and writes elsewhere."""
    folder = shadow.root / ".dvc"
    folder.mkdir()
    config = ["[core]", "no_scm = true", "analytics = false", f"site_cache_dir = {folder / 'site'}"]
    (folder / "config").write_text(
        "\n".join([*config, "[cache]", f"dir = {cache_folder(layout)}"]) + "\n", encoding="utf-8"
    )


class InPlace(NamedTuple):
    """What DVC would not have to make again."""

    data: bool
    """The workload's tokens."""
    cells: set[str]
    """Keys of the cells (`<arm>-<seed>`) that are in place or in the run cache."""
    concluded: bool
    """Every output of the stages after training is as DVC left it."""


def in_place(layout: Layout, study: Study) -> InPlace:
    """Ask DVC what of a study is in place or would be restored from its run cache.

    Uses DVC's Python API, since no command answers this without restoring; a version of DVC whose API has moved
    is refused rather than guessed around, because a wrong answer here trains cells twice.
    """
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    def has(stage: Any) -> bool:
        if not stage.changed():
            return True
        stage.save_deps()
        # Else the outputs in dvc.lock, which may be those of another version, pass for this one's.
        for out in stage.outs:
            out.hash_info = HashInfo()
        try:
            repo.stage_cache.restore(stage, dry=True)
        except RunCacheNotFoundError:
            return False
        return True

    with _repository(layout) as repo:
        (data,) = repo.stage.collect(f"data/dvc.yaml:prepare_data@{study.workload}")
        if data.changed():
            return InPlace(data=False, cells=set(), concluded=False)
        trains, rest = _stages(repo, layout, study) if study.kind == "comparison" else ({}, [])
        return InPlace(
            data=True,
            cells={key for key, stage in trains.items() if has(stage)},
            concluded=not any(stage.changed_outs() for stage in rest),
        )


def kept_outputs(layout: Layout, study: Study) -> set[str]:
    """Keys of the cells whose outputs are in place as the study's lock file has them, whatever they depend on."""
    with _repository(layout) as repo:
        trains, _ = _stages(repo, layout, study)
        return {key for key, stage in trains.items() if not stage.changed_outs()}


def _stages(repo: Any, layout: Layout, study: Study) -> tuple[dict[str, Any], list[Any]]:
    """Of a study's grid the stages that train, by the key of their cell, and the others."""
    stages = repo.stage.collect(str(layout.study(study.slug) / "dvc.yaml"))
    trains = {stage.name.removeprefix("train@"): stage for stage in stages if stage.name.startswith("train@")}
    return trains, [stage for stage in stages if not stage.name.startswith("train@")]


@contextlib.contextmanager
def _repository(layout: Layout) -> Iterator[Any]:
    """DVC's own view of the repository, locked. Raises UsageError where it refuses or has another API."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "true")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    mend_rwlock(layout)

    # It would say on standard output that it restores, where it is only asked whether it could.
    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        # DVC takes relative paths for paths from the working folder.
        with contextlib.chdir(layout.root), Repo(str(layout.root)) as repo, repo.lock:
            _mend_lock_files(repo, layout)
            yield repo
    except (AttributeError, TypeError) as error:
        raise UsageError(
            f"dvc: its Python API is not the one that was tested ({error}); install the version in constraints.txt."
        ) from error
    except DvcException as error:
        raise UsageError(f"dvc: {' '.join(str(error).split())}") from error
