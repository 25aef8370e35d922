"""Copies attempts, ledger and reports to MLflow: what is shown where, and what is copied when.

One experiment a study (and `exploration`). In it one run for the study, named after it, which holds verdicts and
report, and under that one run an attempt, `<arm>/seed-<n>`. A run is found before it is created: an attempt's by its
random id, a study's by `kind = report`; and it is created under a lock. content.py says what a run holds.

    scratch/     an attempt made here: RUNNING while it runs, with its curve as it grows, then its end
    ledger       an attempt whose folder is not here (a colleague's, one of before the scratch folder was emptied)
    reports/     the study's run: FINISHED once there is a report, SCHEDULED before

An attempt that has both a folder and a line in the ledger is one run, since both bear its id. A run that says RUNNING
while its process is gone is closed as abandoned; should the attempt have been going on after all, its end says so.
A run that someone deleted in MLflow stays deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from muonlab.registry.errors import UsageError
from muonlab.registry.ledger import parse_line, read
from muonlab.registry.record import RunRecord
from muonlab.registry.study import Study
from muonlab.registry.yamlfile import read_yaml
from muonlab.tracking import content
from muonlab.tracking.markers import (
    FORM,
    AttemptMarker,
    LedgerMarker,
    LedgerPart,
    ReportMarker,
    attempt_folders,
    attempt_marker,
    curve_lines,
    hide_userinfo,
    ledger_marker,
    read_json,
    read_marker,
    report_content,
    report_files,
    report_marker,
    system_lines,
    unsynced_ledger,
    unsynced_reports,
    write_marker,
)
from muonlab.tracking.process import lives
from muonlab.tracking.store import STORE_LOCK_S, Held, Store, is_deleted

if TYPE_CHECKING:
    from mlflow.entities import Run

KILLED = "the process ended without a word (killed, or the machine stopped)"
REFUSED = "it refuses user or password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
SILENT = "it does not answer"
LINES_AT_ONCE = 100
"""Lines of the ledger between two markers: so many are looked at again after a kill."""


class Mirror:
    """One store, and the repository that is copied to it."""

    def __init__(self, main: Path, uri: str) -> None:
        self.main = main
        self.store = Store(main, uri)
        self.settled: set[Path] = set()
        """Attempts whose whole run is known to be in the store."""
        self._parents: dict[str, str | None] = {}
        self._colours: dict[str, dict[str, str]] = {}

    def sync(self, *, reports: bool, ledger: bool = False) -> list[str]:
        """Copy what the store lacks; return a sentence for each thing that could not be copied.

        `reports` and `ledger` take these along. Attempts that another process copies at this moment are left to it.
        """
        problems: list[str] = []
        if self.store.was_deleted:
            # The open file without a name would take everything, and the markers would promise it.
            return [f"MLflow at {self.store.shown}: deleted while in use; the next start builds it again."]
        try:
            for folder in attempt_folders(self.main):
                if folder not in self.settled:
                    with self._problems_of(str(folder.relative_to(self.main)), problems):
                        self._attempt(folder)
            if ledger:
                self._ledger(problems)
            for study in unsynced_reports(self.main, self.store.uri) if reports else ():
                with self._problems_of(f"reports/{study}", problems):
                    self._report(study)
            if reports:
                self._close_orphans()
        except Exception as error:
            # Whatever a store, a server or the way there can raise: it must not end the follower.
            problems.append(f"MLflow at {self.store.shown}: {self._told(error)}")
        return problems

    @contextmanager
    def _problems_of(self, what: str, problems: list[str]) -> Iterator[None]:
        """Note, and go on after, an error of one thing's own; errors of the store end the pass."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (ValueError, KeyError) as error:
            problems.append(f"{what}: not copied, its files cannot be read: {self._told(error)}")
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            problems.append(f"{what}: refused by MLflow: {self._told(error)}")

    def _told(self, error: Exception) -> str:
        """First line of an error, without the credentials that an address in it may hold."""
        if getattr(error, "error_code", None) in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            return REFUSED
        if "failed with exception" in str(error):
            return f"{type(error).__name__}: {SILENT}"
        lines = str(error).replace(self.store.uri, self.store.shown).splitlines() or [""]
        return f"{type(error).__name__}: {hide_userinfo(lines[0])[:300]}"

    @cached_property
    def _held(self) -> dict[str, Held]:
        """What the store held of all attempts when this process first asked."""
        return self.store.attempts()

    # ---- attempts made here

    def _attempt(self, folder: Path) -> None:
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        promised = marker and marker.done and marker.form == FORM and marker.uri == self.store.shown
        if marker and promised and marker.run_id in self._ids_held:
            self.settled.add(folder)
            return
        with _unless_held(folder / "mlflow.lock") as ours:
            if ours:
                self._copy_attempt(folder)

    @cached_property
    def _ids_held(self) -> set[str]:
        return {held.run_id for held in self._held.values()}

    def _copy_attempt(self, folder: Path) -> None:
        """Copy what the attempt's run lacks; the caller holds the attempt's lock."""
        start = read_json(folder / "start.json")
        base = start["record"]
        # First of all, whether it lives; then the record: when it is there, the curve that is read after it is whole.
        alive = lives(start)
        record = _record(folder)
        points, samples = curve_lines(folder), system_lines(folder)
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        run = self.store.run(marker.run_id) if marker and marker.uri == self.store.shown else None
        if run is None or marker is None:
            run = self._find_or_create(base)
            marker = AttemptMarker(uri=self.store.shown, run_id=run.info.run_id)
        copied = {"points": len(points), "samples": len(samples), "done": record is not None}
        if not is_deleted(run):
            run_id, started = marker.run_id, content.milliseconds(base["started_at"])
            if marker.form != FORM:
                self._describe(run, base, start["cell"])
                copied["form"] = FORM
                if marker.done and record is not None:
                    self._keep_files(run_id, record, _rows(points), bundle=folder.parents[1] / "bundle")
            if not marker.done:
                self.store.log(run_id, metrics=content.curve_metrics(_rows(points[marker.points :]), started))
                self.store.log(run_id, metrics=content.system_metrics(_rows(samples[marker.samples :]), started))
                if record is not None:
                    if marker.closed and record.error is None:
                        self.store.patiently(lambda: self.store.client.delete_tag(run_id, "error"))
                    self._keep_files(run_id, record, _rows(points), bundle=folder.parents[1] / "bundle")
                    self._finish(run_id, record)
                elif not alive and not marker.closed:
                    last = [row["seconds"] for row in _rows(points[-1:])] or [0.0]
                    self._abandon(run_id, started + round(1000 * last[0]))
                    copied["closed"] = True
        marker = marker.model_copy(update={"form": FORM, **copied})
        write_marker(attempt_marker(folder), marker)
        if marker.done:
            self.settled.add(folder)

    def _find_or_create(self, base: dict[str, Any]) -> Run:
        return self.store.find(self._experiment(base), "attempt_id", base["attempt_id"]) or self._create(base)

    def _create(self, base: dict[str, Any]) -> Run:
        tags = self._tags(base) | {"status": "running"}
        started = content.milliseconds(base["started_at"])
        return self.store.create_run(self._experiment(base), content.run_name(base), started, tags)

    def _experiment(self, base: dict[str, Any]) -> str:
        return self.store.experiment(content.experiment_name(base), content.milliseconds(base["started_at"]))

    def _describe(self, run: Run, base: dict[str, Any], cell: dict[str, Any]) -> None:
        """Log tags, parameters and data set; done again for a run that was found: its creator may have been killed."""
        run_id, name = run.info.run_id, content.run_name(base)
        if run.info.run_name != name:
            self.store.patiently(lambda: self.store.client.update_run(run_id, name=name))
        self.store.log(run_id, params=content.parameters(cell), tags=self._tags(base))
        self.store.log_data(run_id, content.dataset(base))

    def _tags(self, base: dict[str, Any]) -> dict[str, str]:
        study = base["study"]
        if study is None:
            return content.attempt_tags(base, None, None)
        parent = self._parent(study, content.milliseconds(base["started_at"]))
        return content.attempt_tags(base, parent, self._colours_of(study).get(base["arm"]))

    def _colours_of(self, study: str) -> dict[str, str]:
        if study not in self._colours:
            self._colours[study] = content.colours(_arms(self.main, study))
        return self._colours[study]

    def _finish(self, run_id: str, record: RunRecord) -> None:
        self.store.log(run_id, metrics=content.final_metrics(record), tags=content.final_tags(record))
        self.store.end(run_id, content.RUN_STATUS[record.status], content.ended(record))

    def _keep_files(
        self, run_id: str, record: RunRecord, rows: Iterable[dict[str, Any]], *, bundle: Path | None = None
    ) -> None:
        """Keep record and curve of a result as files of its run, from which `muon download` brings them."""
        if not record.is_result:
            return
        curve = self._curves.get(record.attempt_id)
        if bundle is not None and (made := _record_in(bundle)) is not None and made.attempt_id == record.attempt_id:
            curve = bundle / content.CURVE_FILE
        self.store.log_files(run_id, content.files(record, curve, rows))

    def _abandon(self, run_id: str, at: int) -> None:
        self.store.log(run_id, tags={"status": "abandoned", "error": KILLED})
        self.store.end(run_id, content.RUN_STATUS["abandoned"], at)

    # ---- the ledger

    def _ledger(self, problems: list[str]) -> None:
        """Give every attempt of the ledger its run; what another process copies at this moment is left to it."""
        part = unsynced_ledger(self.main, self.store.uri)
        if not part.lines:
            return
        path = ledger_marker(self.main)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unless_held(path.with_suffix(".lock")) as ours:
            if ours:
                self._copy_ledger(part, problems)

    def _copy_ledger(self, part: LedgerPart, problems: list[str]) -> None:
        here = _attempts_here(self.main)
        seen = hashlib.sha256(part.before)
        size = len(part.before)
        first = part.before.count(b"\n") + 1
        for at in range(0, len(part.lines), LINES_AT_ONCE):
            for number, line in enumerate(part.lines[at : at + LINES_AT_ONCE], start=first + at):
                if line.strip():
                    with self._problems_of(f"experiments/ledger.jsonl line {number}", problems):
                        row = parse_line(line.decode())
                        # An acceptance is no run: those that it carries over have theirs already.
                        if isinstance(row, RunRecord) and row.attempt_id not in here:
                            self._copy_record(row)
                seen.update(line)
                size += len(line)
            write_marker(
                ledger_marker(self.main), LedgerMarker(uri=self.store.shown, size=size, sha256=seen.hexdigest())
            )

    def _copy_record(self, record: RunRecord) -> None:
        """Bring the run of an attempt that has no folder here up to date with its record."""
        held = self._held.get(record.attempt_id)
        base = record.model_dump(mode="json")
        if held is not None and held.deleted:
            return
        if held is not None and held.status != "RUNNING":
            if record.study is not None and held.parent is None:
                self.store.log(held.run_id, tags=self._tags(base))
            if record.is_result and content.RECORD_FILE not in self.store.file_names(held.run_id):
                self._keep_files(held.run_id, record, content.curve_of_record(record, None))
            return
        run_id = self._create(base).info.run_id if held is None else held.run_id
        file = self._curves.get(record.attempt_id)
        rows = content.curve_of_record(record, file)
        self._keep_files(run_id, record, rows)
        if held is not None and file is None:
            # The times are estimates: a point that was copied while it was measured stands already, at its own.
            stored = self.store.patiently(lambda: self.store.client.get_metric_history(run_id, "curve/val_loss"))
            steps = {point.step for point in stored}
            rows = [row for row in rows if row["step"] not in steps]
        started = content.milliseconds(record.started_at)
        self.store.log(
            run_id,
            metrics=[*content.curve_metrics(rows, started), *content.final_metrics(record)],
            params=content.parameters(cell) if (cell := self._cell(record)) else (),
            tags=self._tags(base) | content.final_tags(record),
        )
        self.store.log_data(run_id, content.dataset(base))
        self.store.end(run_id, content.RUN_STATUS[record.status], content.ended(record))

    @cached_property
    def _curves(self) -> dict[str, Path]:
        """Files of the curves that lie in `runs/`, by the attempt that made them."""
        found = {}
        for path in self.main.glob("runs/*/*/train.json"):
            try:
                attempt = read_json(path)["attempt_id"]
            except (ValueError, KeyError):
                continue  # said by the collect stage, in the report
            if (curve := path.with_name("curve.csv")).exists():
                found[attempt] = curve
        return found

    def _cell(self, record: RunRecord) -> dict[str, Any] | None:
        """What the record's cell computes, where a study's snapshot tells: the digest stands for all of it."""
        return self._cells.get(record.cell_digest)

    @cached_property
    def _cells(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path in self.main.glob("reports/*/registry.json"):
            try:
                snapshot = read_json(path)
                for cell in snapshot["cells"]:
                    if cell["arm"] in snapshot["optimizers"]:
                        optimizer = snapshot["optimizers"][cell["arm"]]
                        computes = {
                            "seed": cell["seed"],
                            "optimizer": {"kind": optimizer["kind"], "options": optimizer["options"]},
                            "settings": snapshot["settings"],
                        }
                        found |= dict.fromkeys((cell["digest"], *cell.get("older", ())), computes)
            except (ValueError, KeyError):
                continue  # a snapshot of another version: the runs are shown without parameters
        return found

    def _close_orphans(self) -> None:
        """Close the runs that say RUNNING and of which nothing is here: their folder was removed under them.

        Only in the repository's own file: on a server, the run may well be going on on another machine.
        """
        if not self.store.is_own:
            return
        # The runs first: an attempt has its folder before its run.
        running = self.store.attempts("attributes.status = 'RUNNING'")
        orphans = {attempt: held for attempt, held in running.items() if not held.deleted}
        if not orphans:
            return
        here = _attempts_here(self.main)
        ledger = read(self.main / "experiments" / "ledger.jsonl")
        ended = {record.attempt_id: record for record in ledger.records}
        for attempt, held in orphans.items():
            if attempt in ended and attempt not in here:
                self._held[attempt] = held
                self._copy_record(ended[attempt])
            elif attempt not in here:
                run = self.store.run(held.run_id)
                assert run is not None, "a run that was found is there"
                stored = self.store.patiently(
                    lambda run_id=held.run_id: self.store.client.get_metric_history(run_id, "curve/val_loss")  # type: ignore[misc]
                )
                self._abandon(held.run_id, max([run.info.start_time, *(point.timestamp for point in stored)]))

    # ---- studies

    def _parent(self, study: str, started: int) -> str | None:
        """Id of the study's own run, created where there is none; None where someone deleted it."""
        if study not in self._parents:
            experiment_id = self.store.experiment(study, started)
            lock = report_marker(self.main, study).with_suffix(".parent.lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=STORE_LOCK_S):
                run = self.store.find(experiment_id, "kind", "report") or self.store.create_run(
                    experiment_id, study, started, content.study_tags(study)
                )
                run_id = run.info.run_id
                if run.info.run_name == "report":  # what it was called in form 1
                    self.store.patiently(lambda: self.store.client.update_run(run_id, name=study))
                if run.info.status == "RUNNING":
                    # Nothing runs in it: until there is a report it waits for its attempts.
                    self.store.patiently(lambda: self.store.client.update_run(run_id, status="SCHEDULED"))
            self._parents[study] = None if is_deleted(run) else run_id
        return self._parents[study]

    def _report(self, study: str) -> None:
        path = report_marker(self.main, study)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unless_held(path.with_suffix(".lock")) as ours:
            if ours:
                self._copy_report(study, path)

    def _copy_report(self, study: str, path: Path) -> None:
        """Bring the study's run up to date with its report; the caller holds the report's lock."""
        folder = self.main / "reports" / study
        copied = report_content(folder)
        verdict = read_json(folder / "verdict.json")
        standing = read_json(folder / "stats.json") if (folder / "stats.json").exists() else {}
        written = round(1000 * (folder / "verdict.json").stat().st_mtime)
        run_id = self._parent(study, written)
        if run_id is not None:
            run = self.store.run(run_id)
            assert run is not None, "a study's run was found or made just now"
            tags = {
                "status": "complete" if verdict["complete"] else "incomplete",
                "mlflow.note.content": verdict["decision"],
                **content.verdict_tags(verdict, standing),
            }
            for stale in [tag for tag in run.data.tags if tag.startswith(content.VERDICT_TAGS) and tag not in tags]:
                self.store.patiently(lambda tag=stale: self.store.client.delete_tag(run_id, tag))  # type: ignore[misc]
            self.store.log(run_id, metrics=content.standing_metrics(standing, written), tags=tags)
            for file in report_files(folder):
                within = file.parent.relative_to(folder).as_posix()
                self.store.client.log_artifact(run_id, str(file), None if within == "." else within)
            self.store.end(run_id, "FINISHED", written)
        write_marker(path, ReportMarker(uri=self.store.shown, run_id=run_id or "", content=copied))


@contextmanager
def _unless_held(path: Path) -> Iterator[bool]:
    """Hold the lock, or yield False where another process does."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _rows(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the rest of a file in which a line was cut short: the record ends its curve there too


def _record(folder: Path) -> RunRecord | None:
    path = folder / "record.json"
    return RunRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _record_in(bundle: Path) -> RunRecord | None:
    """The record of a finished bundle, None where there is none (any more)."""
    try:
        return RunRecord.model_validate_json((bundle / content.RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _attempts_here(main: Path) -> set[str]:
    """Ids of the attempts that have their folder in `scratch/`."""
    found = set()
    for folder in attempt_folders(main):
        try:
            found.add(read_json(folder / "start.json")["record"]["attempt_id"])
        except (ValueError, KeyError):
            continue  # told where the attempt is copied
    return found


def _arms(main: Path, study: str) -> list[str]:
    """Arms of a study as it declares them; none where its declaration is not here or cannot be read."""
    folder = main / "experiments" / study
    try:
        if not (folder / "study.yaml").exists():  # a rehearsal, which has a registration only
            declared = read_json(folder / "registration.json")["declaration"]["study"]
            return [declared["baseline"], *declared["challengers"], *declared["control"], *declared["reference"]]
        content = read_yaml(folder / "study.yaml", where=f"experiments/{study}/study.yaml")
        return Study.model_validate(content["study"]).arms
    except (UsageError, OSError, KeyError, ValueError, TypeError):
        return []
