"""Reports beside a run: of what there is now, and again and again while a study runs.

`report_now` makes what the study's own stages make, by the same functions, so that the same evidence gives the same
bytes. `watch_study` follows a run in another process with reports/<study>/partial.html. It reads `scratch/` and takes
no lock but the ledger's, so that neither the pool nor DVC waits for it.

Looking every few seconds costs no error rate. The partial report gives no verdict, and the rule gives none before all
declared runs have an outcome; the E-value that it then reads keeps its promise however often and whenever one looks
(P[it ever exceeds 1/alpha] <= alpha when there is nothing to find). Who stops a study for what the differences look
like leaves it INCOMPLETE.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from muonlab.pipeline.attempts import AttemptProgress, CellScratch, read_progress
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import is_current, read_evaluations, read_standing
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.study_run import report_without_dvc
from muonlab.registry.errors import UsageError
from muonlab.registry.files import write_atomically
from muonlab.registry.snapshot import DeclaredCell, Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.index import read_judged
from muonlab.reporting.standing import Standing, judge
from muonlab.reporting.wording import count
from muonlab.tracking.process import lives

PARTIAL = "partial.html"
LOOK_EVERY_S = 1.0
RENDER_EVERY_S = 10.0
"""An ended cell is shown at once, the steps of those that run no more often than this: a rendering takes 2 s."""

SETTLED_S = 3.0
"""DVC's report stage follows its stats stage within a second: files that rest for longer are a finished run's."""


def report_now(layout: Layout, slug: str) -> Standing:
    """Collect, judge and report what there is of a study, whole or not; return where it stands.

    Raises UsageError for an unknown study, one that is not a comparison, where nothing was prepared to run it, and
    where a report is there whose runs are not: it came with the repository, and an empty one would replace it.
    """
    study = _comparison(layout, slug)
    if not is_prepared(layout, study):
        raise UsageError(f"{slug}: nothing of it has been prepared or run here yet; `muon study run {slug}` does both.")
    snapshot = collect(layout, slug)
    judged = read_judged(layout.reports(slug))
    rests_on_runs = judged is not None and any(its.n for its in judged.summary.challengers.values())
    if study.provenance == "run" and rests_on_runs and not snapshot.records:
        twin = f"{study.twin_of} --workload {slug.removeprefix(f'{study.twin_of}-')}" if study.twin_of else slug
        raise UsageError(
            f"reports/{slug}: its report is of runs that were made elsewhere, of which none is recorded here, so that "
            f"it is left as it is; `muon study run {twin}` makes them here."
        )
    return report_without_dvc(layout, snapshot)


def watch_study(
    layout: Layout, slug: str, *, say: Callable[[str], None], on_first: Callable[[Path], None] = lambda path: None
) -> Standing:
    """Keep reports/<slug>/partial.html up to date until the study is concluded; return where it then stands.

    `on_first` is given the file once it is there; it is removed at the end, however the watch ends. Raises UsageError
    for an unknown study and for one that is never run.
    """
    study = _comparison(layout, slug)
    if study.provenance == "reported":
        raise UsageError(f"experiments/{slug}: its results were reported by others, so there is no run to watch.")
    path = layout.reports(slug) / PARTIAL
    if not is_prepared(layout, study):
        say(f"nothing of {slug} has been prepared here yet; waiting for `muon study run {slug}`")
    while not is_prepared(layout, study):
        time.sleep(LOOK_EVERY_S)
    snapshot = collect(layout, slug, sweep=False)
    if (standing := _concluded(layout, snapshot)) is not None:
        return standing
    seen: _Pulse | None = None
    shown: _Pulse | None = None
    checked = None
    rendered_at = still_since = time.monotonic()
    try:
        while True:
            pulse, now = _pulse(layout, snapshot), time.monotonic()
            if seen is None or pulse.results != seen.results:
                still_since = now
            seen = pulse
            if now - still_since >= SETTLED_S and (pulse.results, pulse.ended) != checked:
                checked = pulse.results, pulse.ended
                snapshot = collect(layout, slug, sweep=False)
                if (standing := _concluded(layout, snapshot)) is not None:
                    return standing
            if (
                shown is None
                or pulse.ended != shown.ended
                or (pulse.running != shown.running and now - rendered_at >= RENDER_EVERY_S)
            ):
                snapshot = collect(layout, slug, sweep=False)
                pulse = _pulse(layout, snapshot)
                _render(layout, snapshot, pulse, path)
                say(f"{_state(snapshot, pulse)}: {path.relative_to(layout.root)}")
                if shown is None:
                    on_first(path)
                shown, rendered_at = pulse, now
            time.sleep(LOOK_EVERY_S)
    finally:
        path.unlink(missing_ok=True)


class _Pulse(NamedTuple):
    """What is seen of a study at a glance."""

    ended: frozenset[str]
    """Recorded attempts at the declared cells: digest/number."""
    running: dict[str, AttemptProgress | None]
    """Cell -> where its running attempt stands; None before its first step."""
    results: tuple[int, ...]
    """When each of the study's own results was last written, in ns; 0 where it is missing."""


def _pulse(layout: Layout, snapshot: Snapshot) -> _Pulse:
    ended = set()
    running = {}
    for cell in snapshot.cells:
        for folder in CellScratch(layout, cell.digest).attempt_folders():
            if (folder / "record.json").exists():
                ended.add(f"{cell.digest}/{folder.name}")
            elif _is_alive(folder):
                running[_name(cell)] = read_progress(folder)
    reports = layout.reports(snapshot.study.slug)
    files = [reports / name for name in ("registry.json", "stats.json", "verdict.json", "report.md", "report.html")]
    return _Pulse(frozenset(ended), running, tuple(_written_ns(path) for path in files))


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_alive(attempt: Path) -> bool:
    start = attempt / "start.json"
    return start.exists() and lives(json.loads(start.read_text(encoding="utf-8")))


def _name(cell: DeclaredCell) -> str:
    return f"{cell.arm}-{cell.seed}"


def _comparison(layout: Layout, slug: str) -> Study:
    study = load_study(layout, slug)
    if study.kind != "comparison":
        raise UsageError(
            f"experiments/{slug}: kind is {study.kind!r}, and only a comparison is followed with a partial report; "
            f"`muon report {slug}` reports what there is."
        )
    return study


def is_prepared(layout: Layout, study: Study) -> bool:
    """Whether the study's cells can be named: each hashes the code and the data that it would run on."""
    if study.provenance == "reported":
        return True
    paths = [layout.data(study.workload) / "meta.json", *map(layout.fingerprint, study.arms)]
    return all(path.exists() for path in paths)


def _concluded(layout: Layout, snapshot: Snapshot) -> Standing | None:
    """The standing that the study's report shows, where that is whole and made from this evidence."""
    if not (is_current(layout, snapshot) and (layout.reports(snapshot.study.slug) / "report.html").exists()):
        return None
    try:
        standing = read_standing(layout, snapshot.study.slug)
    except UsageError:
        return None  # not judged yet
    return standing if standing.complete and standing.snapshot == snapshot else None


def _render(layout: Layout, snapshot: Snapshot, pulse: _Pulse, path: Path) -> None:
    from muonlab.reporting.report import write_report

    standing = judge(snapshot, read_evaluations(layout, snapshot.study.slug))
    notes = [*(f"training now: {_progress(*item)}" for item in sorted(pulse.running.items())), *standing.notes]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_report(standing.model_copy(update={"notes": notes}), Path(folder), partial=True)
        write_atomically(path, (Path(folder) / "report.html").read_text(encoding="utf-8"), durable=False)


def _progress(cell: str, at: AttemptProgress | None) -> str:
    if at is None:
        return f"{cell}, starting"
    loss = "" if at.loss is None else f", training loss {at.loss:.3f}"
    return f"{cell} at step {at.step} of {at.steps}{loss}"


def _state(snapshot: Snapshot, pulse: _Pulse) -> str:
    ended = sum(snapshot.outcome_of(cell) is not None for cell in snapshot.cells)
    text = f"{ended} of {count(len(snapshot.cells), 'run')} ended"
    if pulse.running:
        return f"{text}, training {'; '.join(_progress(*item) for item in sorted(pulse.running.items()))}"
    slug = snapshot.study.slug
    if ended == len(snapshot.cells):
        return f"{text}; `muon study run {slug}` takes them over and concludes the study"
    return f"{text}, none trains now; waiting for `muon study run {slug}`"
