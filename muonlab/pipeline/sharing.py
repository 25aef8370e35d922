"""What others get of the runs made here: records by git, outputs by DVC's remote.

A commit holds what a verdict rests on and what says it: ledger, registrations, results of tuning, lock files, reports.
Never weights, data or scratch files, which are DVC's or nobody's: paths are taken from a list, not left out by one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch, fnmatchcase
from typing import Literal, NamedTuple

from muonlab.pipeline import doors
from muonlab.pipeline.answer import Answer
from muonlab.pipeline.cells import CURRENT
from muonlab.pipeline.gates import ARCHIVE
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, load_study
from muonlab.registry import ledger
from muonlab.registry.errors import CellsFailedError, IntegrityError, UsageError, unknown_name
from muonlab.registry.record import RunRecord
from muonlab.registry.study import Study
from muonlab.registry.yamlfile import read_yaml
from muonlab.reporting.wording import count

LEDGER = "experiments/ledger.jsonl"
SHARED = (
    LEDGER,
    ARCHIVE,
    "experiments/*/registration.json",
    "experiments/*/results.csv",
    "experiments/*/dvc.yaml",
    "experiments/*/dvc.lock",
    "data/dvc.lock",
    "dvc.lock",
    ".dvcignore",
    "reports/README.md",
    *(f"reports/*/{name}" for name in ("report.md", "report.html", "*.json", "*.jsonl")),
    *(f"reports/*/figures/*.{suffix}" for suffix in ("svg", "csv")),
)
"""What `muon commit` takes, one level a `*`."""


class Committed(Answer):
    """What `muon commit` has committed, or would."""

    files: list[str]
    """Paths in the repository."""
    commit: str | None
    """Null for a dry run, and where there was nothing to commit."""

    def lines(self) -> Iterator[str]:
        """The files, then the commit."""
        yield from self.files
        if not self.files:
            yield "Nothing to commit: ledger, registrations, lock files and reports are as in the last commit."
        elif self.commit is None:
            yield f"{count(len(self.files), 'file')} would be committed."
        else:
            yield f"{count(len(self.files), 'file')} committed as {self.commit[:12]}."


def commit_results(layout: Layout, message: str, *, dry_run: bool = False) -> Committed:
    """Commit the changed files of `SHARED`, and nothing that is staged besides.

    Raises UsageError without a message, outside git, or where git refuses; IntegrityError where committed lines of the
    ledger would be taken out.
    """
    if not message.strip():
        raise UsageError("muon commit: the message is empty; say in a sentence what was run, or what came out.")
    files = shared_changes(layout)
    if LEDGER in files:
        _refuse_lost_lines(layout)
    if dry_run or not files:
        return Committed(files=files, commit=None)
    # What was removed by `git rm` is staged already, and unknown to `git add`.
    if present := [path for path in files if (layout.main / path).exists() or _git(layout, "ls-files", "--", path)]:
        _git(layout, "add", "--all", "--", *present)
    _git(layout, "commit", "--quiet", "--message", message, "--only", "--", *files)
    return Committed(files=files, commit=_git(layout, "rev-parse", "HEAD").strip())


def shared_changes(layout: Layout) -> list[str]:
    """The files of `SHARED` that are not as committed."""
    return [path for path in _changed(layout) if is_shared(path)]


def is_shared(path: str) -> bool:
    """Whether `muon commit` takes a path of the repository."""
    # The report on the one cell of params.yaml is rewritten by every `dvc exp run`, which keeps it in its own refs.
    return not path.startswith(f"reports/{CURRENT}/") and any(_matches(path, pattern) for pattern in SHARED)


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(fnmatch(part, want) for part, want in zip(parts, wanted, strict=True))


def _changed(layout: Layout) -> list[str]:
    # --no-renames: a renamed file is one path gone and one that is new.
    shown = _git(layout, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".")
    prefix = _git(layout, "rev-parse", "--show-prefix").strip()
    return sorted(entry[3:].removeprefix(prefix) for entry in shown.split("\0") if entry)


def _refuse_lost_lines(layout: Layout) -> None:
    changes = _git(layout, "diff", "--numstat", "HEAD", "--", LEDGER).split()
    if changes and changes[1] != "0":
        lost = "all of it" if changes[1] == "-" else f"{count(int(changes[1]), 'committed line')} of it"
        raise IntegrityError(
            f"{LEDGER}: {lost} would be taken out or changed, and the ledger "
            f"only grows; `muon study status` puts lines back, and `git diff {LEDGER}` shows edited ones."
        )


def _git(layout: Layout, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=layout.main, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UsageError(f"`git {arguments[0]}` failed: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


DOWNLOADS = "downloads"
"""Where what MLflow has of runs lies, by study and cell; neither git nor DVC looks there."""


class Downloaded(NamedTuple):
    """Where the outputs of cells lie now, as folders in the repository."""

    folders: list[str]
    """With record, curve and weights, from the DVC remote."""
    without_weights: list[str]
    """With record and curve, from MLflow."""


def download(layout: Layout, cell: str) -> Downloaded:
    """Bring outputs of cells here: from DVC's default remote, and what it lacks, without the weights, from MLflow.

    `cell` is `<arm>-<seed>` of the study that params.yaml names, or `<study>/<arm>-<seed>`; as a shell pattern it
    stands for all cells of the study that it matches and that have been run. Raises UsageError for a cell that no grid
    holds, and for one that neither of the two has; CellsFailedError where DVC fails and MLflow has nothing.
    """
    from dvc.config import Config

    slug, _, pattern = cell.rpartition("/")
    study = load_study(layout, slug or load_params(layout.params).study)
    if study.kind == "tuning" or study.provenance == "reported":
        raise UsageError(f"experiments/{study.slug}: DVC keeps outputs of comparisons that were run, and of this none.")
    keys = _cells_like(layout, study, pattern)
    has_remote = bool(Config(str(layout.root / ".dvc"))["remote"])
    failure, pulled = _pull(layout, study, keys) if has_remote else (None, set[str]())
    found = Downloaded([], [])
    for key in keys:
        folder = layout.runs(study.slug) / key
        if key in pulled:
            found.folders.append(folder.relative_to(layout.root).as_posix())
        elif (kept := _from_mlflow(layout, study, key)) is not None:
            found.without_weights.append(kept)
        elif failure is not None:
            raise failure
        elif not has_remote:
            raise UsageError(
                f"{study.slug}/{key}: no DVC remote is declared and MLflow has no files of its run, so that there is "
                "nowhere to download from; `dvc remote add -d NAME ADDRESS` declares one (a folder, ssh, s3), and "
                "`muon study run` trains it here."
            )
        else:
            raise UsageError(
                f"{study.slug}/{key}: the lock file experiments/{study.slug}/dvc.lock does not name its outputs; it is "
                "committed by who has run the study (`muon commit`), and `git pull` brings it."
            )
    return found


def _cells_like(layout: Layout, study: Study, pattern: str) -> list[str]:
    """The study's cells that a name or pattern stands for. Raises UsageError where there is none."""
    keys = [f"{arm}-{seed}" for arm in study.arms for seed in study.seeds]
    if pattern in keys:
        return [pattern]
    found = [key for key in keys if fnmatchcase(key, pattern)]
    if not found:
        raise unknown_name(
            f"experiments/{study.slug}", "cell", pattern, keys, all_in=f"`muon study status {study.slug}`"
        )
    results = {f"{r.arm}-{r.seed}" for r in _results(layout, study)}
    if not results & set(found):
        raise UsageError(
            f"experiments/{study.slug}: the ledger has no result of {pattern!r}; who has run it commits it "
            "(`muon commit`), and `git pull` brings it."
        )
    return [key for key in found if key in results]


def _results(layout: Layout, study: Study) -> list[RunRecord]:
    """The ledger's results on the study's workload, its own first, then the newest first."""
    results = [r for r in ledger.read(layout.ledger).records if r.is_result and r.workload == study.workload]
    newest = sorted(results, key=lambda r: r.started_at, reverse=True)
    return sorted(newest, key=lambda r: r.study != study.slug)


def _pull(layout: Layout, study: Study, keys: list[str]) -> tuple[CellsFailedError | None, set[str]]:
    """Let DVC bring the cells that the study's lock file names; return why it failed, or None and what it brought.

    What DVC has pulled is as the lock file says; what lay there before may be of another declaration.
    """
    path = layout.study(study.slug) / "dvc.lock"
    locked = read_yaml(path, where=f"experiments/{study.slug}/dvc.lock")["stages"] if path.exists() else {}
    named = [key for key in keys if f"train@{key}" in locked]
    try:
        lay_out(layout, study, named, "pull")
    except CellsFailedError as error:
        return error, set()
    return None, set(named)


def lay_out(layout: Layout, study: Study, keys: list[str], command: Literal["checkout", "pull"]) -> None:
    """Let DVC lay the outputs of cells that the study's lock file names into runs/, from its cache or its remote.

    Raises CellsFailedError where it fails.
    """
    doors.write_grid(layout, study)
    doors.make_folders(layout, study)
    doors.set_open_studies(layout, sorted({*doors.open_studies(layout), study.slug}))
    if keys:
        doors.dvc(layout, command, *(f"experiments/{study.slug}/dvc.yaml:train@{key}" for key in keys))


def _from_mlflow(layout: Layout, study: Study, key: str) -> str | None:
    """Bring record and curve of a cell from MLflow; return their folder in the repository, None where it has none."""
    from muonlab.tracking.files import bring_files

    folder = f"{DOWNLOADS}/{study.slug}/{key}"
    runs = [r for r in _results(layout, study) if f"{r.arm}-{r.seed}" == key]
    return folder if bring_files(layout.main, runs, layout.main / folder) is not None else None
