"""Bring home what a run on another machine has left, and believe none of it unseen.

Its commit may touch nothing but what `muon commit` takes, and only add to the ledger, every line of which is verified;
it is then merged by git, as a colleague's is (docs/sharing.md). Outputs are named by the lock file in that commit: each
object is hashed as it arrives and goes into DVC's cache, from which DVC lays it out. A finished cell that no lock file
names, since its study is not complete, comes as the bundle that waits there, and waits here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from muonlab.pipeline import doors
from muonlab.pipeline.attempts import BUNDLE_FILES, WEIGHTS, CellScratch
from muonlab.pipeline.evaluations import read_record
from muonlab.pipeline.fingerprint import environment
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.remote.link import Link
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.sharing import DOWNLOADS, LEDGER, is_shared, lay_out
from muonlab.registry import ledger
from muonlab.registry.canonical import sha256_of
from muonlab.registry.errors import IntegrityError, UsageError, unknown_name
from muonlab.registry.record import RunRecord
from muonlab.registry.study import Study
from muonlab.reporting.wording import count


def bring(link: Link, slug: str, *, run: str | None = None, cells: str = "*", weights: bool = True) -> list[str]:
    """Merge the results of a run, by default the study's last one there, and bring the outputs of its cells.

    `cells` is a shell pattern of `<arm>-<seed>`. Without `weights`, record and curve are laid into downloads/, which
    neither git nor DVC looks at. Returns what came, in sentences. Raises UsageError where there is nothing or git
    refuses to merge, and IntegrityError, with nothing merged, for what a run cannot have left.
    """
    states = [s for s in link.ask("runs")["runs"] if s["study"] == slug and s["results"] and run in (None, s["run"])]
    if not states:
        raise UsageError(
            f"{link.remote.name}: no run of {slug} has left results there; `muon status --remote {link.remote.name}` "
            "says what runs."
        )
    state, layout = states[-1], link.layout
    results = _fetch(link, state)
    records = _check(layout, state["commit"], results, link.remote.name)
    study = load_study(layout, slug)
    declared = [f"{arm}-{seed}" for arm in study.arms for seed in study.seeds]
    keys = [key for key in declared if fnmatchcase(key, cells)]
    if not keys:
        raise unknown_name(f"experiments/{slug}", "cell", cells, declared)
    # Merged last: a connection that is lost before leaves nothing half done here, and objects that came are kept.
    outputs = _outputs(layout, study, keys, results)
    fetched = _bring_objects(link, study, keys, outputs, records, weights=weights)
    _merge(layout, results, state["run"])
    told = [f"{count(len(records), 'row')} of the ledger came with commit {results[:12]}, which is merged."]
    told += [f"{link.remote.name} no longer has the outputs of {key}." for key in fetched.lost]
    whole = {key: files for key, files in outputs.items() if key not in fetched.lost}
    if weights:
        lay_out(layout, study, list(whole), "checkout")
        told.append(f"Outputs of {count(len(whole), 'cell')} are in runs/{slug}.")
    else:
        _lay_aside(layout, study, whole)
        told.append(f"Record and curve of {count(len(whole), 'cell')} are in {DOWNLOADS}/{slug}, without weights.")
    if fetched.waiting:
        told.append(
            f"{count(fetched.waiting, 'finished cell')} of the study, which is incomplete, wait here to be taken over."
        )
    elsewhere = {r.hashes.environment: r for r in records if r.is_result}
    if other := next((r for its, r in elsewhere.items() if its != sha256_of(environment())), None):
        told.append(
            f"These runs were made with torch {other.provenance.torch} on {other.provenance.device}, which is another "
            f"environment than this one: reports/{slug} has their verdict, and `muon study run {slug}` here would "
            "train the cells anew."
        )
    return told


def _git(layout: Layout, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=layout.main, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise IntegrityError(f"`git {' '.join(arguments[:2])}` failed: {done.stderr.strip()}")
    return done.stdout


def _fetch(link: Link, state: dict[str, Any]) -> str:
    """Fetch a run's commit, each object of it checked by git; return its hash."""
    ref = f"refs/muonlab/{link.remote.name}/{state['run']}"
    there = f"{link.ask('hello')['folder']}/repository.git"
    fetch = ["-c", "fetch.fsckObjects=true", "fetch", "--quiet", "--no-tags", "URL"]
    link.git(*fetch, f"+refs/muonlab/results/{state['run']}:{ref}", path=there)
    return _git(link.layout, "rev-parse", f"{ref}^{{commit}}").strip()


def _check(layout: Layout, sent: str, results: str, where: str) -> list[RunRecord]:
    """The records that a commit adds to the one that was sent. Raises IntegrityError for anything else in it."""
    parents = _git(layout, "rev-list", "--parents", "--max-count=1", results).split()[1:]
    if parents != [sent]:
        raise IntegrityError(
            f"{where}: commit {results[:12]} does not follow on {sent[:12]}, which was sent; nothing of it was merged."
        )
    changed = [p for p in _git(layout, "diff", "--name-only", "--no-renames", "-z", sent, results).split("\0") if p]
    if foreign := [path for path in changed if not is_shared(path)]:
        raise IntegrityError(
            f"{where}: commit {results[:12]} changes {foreign[0]}, which no run writes; nothing of it was merged."
        )
    before, after = (_ledger_lines(layout, commit) for commit in (sent, results))
    if after[: len(before)] != before:
        raise IntegrityError(
            f"{where}: commit {results[:12]} takes lines out of the ledger or changes them, and the ledger only grows; "
            "nothing of it was merged."
        )
    records = []
    for number, line in enumerate(after[len(before) :], start=len(before) + 1):
        try:
            row = ledger.parse_line(line)
        except ValueError as error:
            raise IntegrityError(
                f"{where}: line {number} of the ledger that came from there {error}; nothing of it was merged."
            ) from None
        if not isinstance(row, RunRecord):
            raise IntegrityError(
                f"{where}: line {number} of the ledger that came from there is no run's record, and a run writes "
                "nothing else; nothing of it was merged."
            )
        records.append(row)
    return records


def _ledger_lines(layout: Layout, commit: str) -> list[str]:
    shown = subprocess.run(["git", "show", f"{commit}:./{LEDGER}"], cwd=layout.main, capture_output=True, check=False)
    return [line for line in shown.stdout.decode(errors="replace").split("\n") if line]


def _merge(layout: Layout, results: str, run: str) -> None:
    merged = subprocess.run(
        ["git", "merge", "--quiet", "--no-edit", "-m", f"Merge the results of {run}", results],
        cwd=layout.main, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if merged.returncode == 0:
        return
    subprocess.run(["git", "merge", "--abort"], cwd=layout.main, capture_output=True, check=False)
    said = [line.strip() for line in (merged.stdout + merged.stderr).splitlines() if line.strip()]
    raise UsageError(
        f"git does not merge the results of {run} ({said[0] if said else merged.returncode}); commit what is here "
        f'(`muon commit "..."`), then `git merge {results[:12]}` shows what is left to decide (docs/sharing.md), and '
        "`muon download --remote` brings the outputs."
    )


def _outputs(layout: Layout, study: Study, keys: list[str], results: str) -> dict[str, dict[str, str]]:
    """Cell -> file -> MD5 (hex), of those that the lock file in the commit names."""
    shown = subprocess.run(
        ["git", "show", f"{results}:./experiments/{study.slug}/dvc.lock"],
        cwd=layout.main, capture_output=True, text=True, check=False,
    )  # fmt: skip
    stages = yaml.safe_load(shown.stdout)["stages"] if shown.returncode == 0 else {}
    return {
        key: {out["path"]: out["md5"] for out in stages[f"train@{key}"]["outs"]}
        for key in keys
        if f"train@{key}" in stages
    }


class _Fetched(NamedTuple):
    lost: list[str]
    """Cells of which the machine no longer has all that its lock file names."""
    waiting: int
    """Bundles that wait here to be adopted."""


def _bring_objects(
    link: Link, study: Study, keys: list[str], outputs: dict[str, dict[str, str]], records: list[RunRecord], *,
    weights: bool,
) -> _Fetched:  # fmt: skip
    """Bring what DVC's cache lacks of the outputs, and the bundles of finished cells that no lock file names."""
    layout = link.layout
    wanted = {md5 for files in outputs.values() for name, md5 in files.items() if weights or name != WEIGHTS}
    cache = doors.cache_folder(layout) / "files" / "md5"
    missing = sorted(md5 for md5 in wanted if not _object(cache, md5).exists())
    waiting = {
        record.cell_digest: record
        for record in records
        if record.is_result
        and weights
        and record.study == study.slug
        and (key := f"{record.arm}-{record.seed}") in keys
        and key not in outputs
    }
    layout.scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=layout.scratch, prefix="arriving-") as folder:
        arrived = Path(folder)
        link.bring(arrived, objects=missing, bundles=sorted(waiting))
        gone = [md5 for md5 in missing if not _take_object(arrived / "objects" / md5, cache, md5, link.remote.name)]
        taken = [_take_bundle(layout, arrived / "bundles" / digest, record) for digest, record in waiting.items()]
    return _Fetched([key for key, files in outputs.items() if set(files.values()) & set(gone)], sum(taken))


def _lay_aside(layout: Layout, study: Study, outputs: dict[str, dict[str, str]]) -> None:
    cache = doors.cache_folder(layout) / "files" / "md5"
    for key, files in outputs.items():
        target = layout.main / DOWNLOADS / study.slug / key
        target.mkdir(parents=True, exist_ok=True)
        for name in (name for name in files if name != WEIGHTS):
            shutil.copyfile(_object(cache, files[name]), target / name)


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _take_object(path: Path, cache: Path, md5: str, where: str) -> bool:
    """Move an object that has arrived into DVC's cache; False where it has not. Raises IntegrityError for another."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise IntegrityError(f"{where}: an object that came from there has the hash {found}, and {md5} was asked for.")
    target = _object(cache, md5)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    target.chmod(0o444)  # as DVC keeps them
    return True


def _take_bundle(layout: Layout, arrived: Path, record: RunRecord) -> bool:
    """Move a bundle that has arrived to where it waits to be adopted; False where none has, or another run's."""
    if not all((arrived / name).is_file() for name in (*BUNDLE_FILES, "manifest.json")):
        return False
    if read_record(arrived) != record:
        return False
    scratch = CellScratch(layout, record.cell_digest)
    scratch.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch.bundle, ignore_errors=True)
    os.replace(arrived, scratch.bundle)
    return scratch.finished() is not None
