"""Copies attempts and reports to MLflow: the only import of mlflow in the project.

One experiment a study (and `exploration`), in it one run an attempt and one run, `report`, for the study's
report. A run is found by its attempt's random id before it is created, and created under the attempt's lock.

    start.json   -> name, parameters, tags, dataset; status RUNNING
    curve.jsonl  -> curve/<column>, optimizer/<diagnostic>   at (step, started_at + seconds)
    record.json  -> val_loss, perplexity, cost_usd, wall_seconds, final_step; status and end

A point's timestamp is computed from the attempt and not taken from the clock: the store holds a (key, timestamp,
step, value) once, so a replay adds nothing. The curve has names of its own because its losses are measured on the
validation subset, and the final `val_loss` on the whole split: in one series the last step would have two values.
`seconds` and `tokens` are not series: the first is the timestamp, the second the step times a constant.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from muonlab.registry.canonical import canonical_json
from muonlab.registry.record import RunRecord
from muonlab.tracking.markers import (
    SQLITE,
    AttemptMarker,
    ReportMarker,
    attempt_folders,
    attempt_marker,
    curve_lines,
    default_uri,
    hide_userinfo,
    read_marker,
    report_content,
    report_files,
    report_marker,
    sqlite_file,
    store_is_gone,
    unsynced_reports,
    without_credentials,
    write_marker,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EXPLORATION = "exploration"
RUN_STATUS = {"completed": "FINISHED", "diverged": "FINISHED", "failed": "FAILED", "abandoned": "KILLED"}
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the page of an experiment open on its training runs."""
BATCH = 1000
"""Metrics in one request: the most that MLflow takes."""
LOCKED_TRIES = 4
"""Each waits up to MLflow's own 20 s for the lock of an sqlite file."""
STORE_LOCK_S = 60.0
NOT_SERIES = ("step", "seconds", "tokens")
DIAGNOSTIC_PREFIX = "opt_"

T = TypeVar("T")


class Mirror:
    """One store, and the repository that is copied to it."""

    def __init__(self, main: Path, uri: str) -> None:
        self.main = main
        self.uri = uri
        self.shown = without_credentials(uri)
        self.settled: set[Path] = set()
        """Attempts whose whole run is known to be in the store."""
        self._experiments: dict[str, str] = {}

    def sync(self, *, reports: bool) -> list[str]:
        """Copy what the store lacks; return a sentence for each thing that could not be copied.

        Attempts that another process copies at this moment are left to it.
        """
        problems: list[str] = []
        if "client" in vars(self) and store_is_gone(self.main, self.uri):
            # The open file without a name would take everything, and the markers would promise it.
            return [f"MLflow at {self.shown}: deleted while in use; the next start builds it again."]
        try:
            for folder in attempt_folders(self.main):
                if folder not in self.settled:
                    with self._problems_of(str(folder.relative_to(self.main)), problems):
                        self._attempt(folder)
            for study in unsynced_reports(self.main, self.uri) if reports else ():
                with self._problems_of(f"reports/{study}", problems):
                    self._report(study)
        except Exception as error:
            # Whatever a store, a server or the way there can raise: it must not end the follower.
            problems.append(f"MLflow at {self.shown}: {self._told(error)}")
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
        lines = str(error).replace(self.uri, self.shown).splitlines() or [""]
        return f"{type(error).__name__}: {hide_userinfo(lines[0])[:300]}"

    @cached_property
    def client(self) -> MlflowClient:
        """The store's client; an sqlite file that is not there is created, by one process at a time."""
        _set_environment()
        from mlflow import MlflowClient

        lock = self.main / "scratch" / "mlflow-store.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=STORE_LOCK_S):
            file = sqlite_file(self.main, self.uri)
            if file is not None and not file.exists():
                # Elsewhere, and then renamed: the migrations take seconds, and a file that a kill left between
                # two of them is one that MLflow never opens again.
                part = file.with_name(f"{file.name}-part")
                for left in part.parent.glob(f"{part.name}*"):  # with its journal
                    left.unlink()
                new = f"{SQLITE}{part.resolve()}"
                MlflowClient(tracking_uri=new, registry_uri=new).search_experiments(max_results=1)
                os.replace(part, file)
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @cached_property
    def _runs_at_start(self) -> set[str]:
        """Ids of all runs in the experiments of the attempts, deleted ones included, as this process found them."""
        from mlflow.entities import ViewType

        names = {_experiment_name(_json(folder / "start.json")) for folder in attempt_folders(self.main)}
        experiments = self._all_pages(
            lambda token: self.client.search_experiments(view_type=ViewType.ALL, page_token=token)
        )
        ids = [e.experiment_id for e in experiments if e.name in names]
        runs = self._all_pages(lambda token: self.client.search_runs(ids, run_view_type=ViewType.ALL, page_token=token))
        return {run.info.run_id for run in runs}

    def _all_pages(self, page: Callable[[str | None], Any]) -> Iterator[Any]:
        token = None
        while True:
            found = self._patiently(lambda at=token: page(at))  # type: ignore[misc]
            yield from found
            token = found.token
            if not token:
                return

    def _patiently(self, call: Callable[[], T]) -> T:
        """Make a call that may be repeated again while another process has the sqlite file, or got there first."""
        from mlflow.exceptions import MlflowException

        for left in reversed(range(LOCKED_TRIES)):
            try:
                return call()
            except MlflowException as error:
                passing = "database is locked" in str(error) or "UNIQUE constraint" in str(error)
                if not passing or error.error_code == "RESOURCE_ALREADY_EXISTS" or not left:
                    raise
                time.sleep(0.2)
        raise AssertionError("unreachable: the last try returns or raises")

    # ---- attempts

    def _attempt(self, folder: Path) -> None:
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        if marker and marker.done and marker.uri == self.shown and marker.run_id in self._runs_at_start:
            self.settled.add(folder)
            return
        with _unless_held(folder / "mlflow.lock") as ours:
            if ours:
                self._copy_attempt(folder)

    def _copy_attempt(self, folder: Path) -> None:
        """Copy what the attempt's run lacks; the caller holds the attempt's lock."""
        start = _json(folder / "start.json")
        # The record first: when it is there, the curve that is read after it is whole.
        record = _record(folder)
        lines = curve_lines(folder)
        marker = read_marker(attempt_marker(folder), AttemptMarker)
        run = self._run_of(marker) if marker and marker.uri == self.shown else None
        if run is None or marker is None:
            run = self._find_or_create(start)
            marker = AttemptMarker(uri=self.shown, run_id=run.info.run_id)
            self._describe(run, start)
        if run.info.lifecycle_stage == "deleted":
            # Someone deleted the run in MLflow: it stays deleted.
            marker = marker.model_copy(update={"points": len(lines), "done": record is not None})
        elif not marker.done:
            started = _milliseconds(start["record"]["started_at"])
            self._log(marker.run_id, curve_metrics(_rows(lines[marker.points :]), started))
            if record is not None:
                self._finish(marker.run_id, record, started)
            marker = marker.model_copy(update={"points": len(lines), "done": record is not None})
        write_marker(attempt_marker(folder), marker)
        if marker.done:
            self.settled.add(folder)

    def _run_of(self, marker: AttemptMarker | ReportMarker) -> Run | None:
        """The marker's run, or None where the store does not have it (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            return self._patiently(lambda: self.client.get_run(marker.run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _find(self, experiment_id: str, tag: str, value: str) -> Run | None:
        from mlflow.entities import ViewType

        found = self._patiently(
            lambda: self.client.search_runs(
                [experiment_id], f"tags.`{tag}` = '{value}'", run_view_type=ViewType.ALL, max_results=1
            )
        )
        return found[0] if found else None

    def _find_or_create(self, start: dict[str, Any]) -> Run:
        base = start["record"]
        experiment_id = self._experiment(_experiment_name(start))
        tags = {
            **{key: str(base[key]) for key in ("arm", "seed", "workload", "cell_digest", "attempt", "attempt_id")},
            "kind": "attempt",
            "study": _experiment_name(start),
            "device": base["provenance"]["device"],
            "status": "running",
            "mlflow.source.name": "stages.train",
            "mlflow.source.type": "LOCAL",
        }
        if base["provenance"]["commit"]:
            tags["mlflow.source.git.commit"] = base["provenance"]["commit"]
        return self._find(experiment_id, "attempt_id", base["attempt_id"]) or self._patiently(
            lambda: self.client.create_run(
                experiment_id,
                start_time=_milliseconds(base["started_at"]),
                tags=tags,
                run_name=f"{base['arm']}/seed-{base['seed']}",
            )
        )

    def _experiment(self, name: str) -> str:
        """Id of the experiment of that name, created where there is none, restored where it was deleted."""
        from mlflow.exceptions import MlflowException

        if name not in self._experiments:
            found = self._patiently(lambda: self.client.get_experiment_by_name(name))
            if found is None:
                # Another store's server decides itself where artifacts go; the file in the repository has no server.
                own = self.uri == default_uri(self.main)
                location = str(self.main.resolve() / "mlartifacts" / name) if own else None
                try:
                    self._patiently(lambda: self.client.create_experiment(name, artifact_location=location, tags=KIND))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                found = self._patiently(lambda: self.client.get_experiment_by_name(name))
            assert found is not None, "an experiment that exists is found"
            if found.lifecycle_stage == "deleted":
                self._patiently(lambda: self.client.restore_experiment(found.experiment_id))
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _describe(self, run: Run, start: dict[str, Any]) -> None:
        """Log parameters and data set; done again for a run that was found, since its creator may have been killed."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        if run.info.lifecycle_stage == "deleted":
            return
        base = start["record"]
        params = [Param(key, value) for key, value in parameters(start["cell"]).items()]
        data = Dataset(
            name=base["workload"],
            digest=base["hashes"]["data"][:16],
            source_type="local",
            source=json.dumps({"uri": f"data/{base['workload']}"}),
        )
        of_training = DatasetInput(data, [InputTag("mlflow.data.context", "training")])
        run_id = run.info.run_id
        for at in range(0, len(params), 100):  # the most that MLflow takes in one request
            self._patiently(lambda at=at: self.client.log_batch(run_id, params=params[at : at + 100]))  # type: ignore[misc]
        self._patiently(lambda: self.client.log_inputs(run_id, [of_training]))

    def _log(self, run_id: str, metrics: Iterable[Metric], tags: dict[str, str] | None = None) -> None:
        from mlflow.entities import RunTag

        found = list(metrics)
        for at in range(0, len(found), BATCH):
            self._patiently(lambda at=at: self.client.log_batch(run_id, metrics=found[at : at + BATCH]))  # type: ignore[misc]
        if tags:
            self._patiently(lambda: self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()]))

    def _finish(self, run_id: str, record: RunRecord, started: int) -> None:
        from mlflow.entities import Metric

        ended = started + round(1000 * record.wall_seconds)
        values = record.model_dump(include={"val_loss", "perplexity", "cost_usd", "wall_seconds", "final_step"})
        self._log(
            run_id,
            [Metric(key, value, ended, record.final_step) for key, value in values.items() if value is not None],
            {"status": record.status} | ({"error": record.error} if record.error else {}),
        )
        self._patiently(lambda: self.client.set_terminated(run_id, RUN_STATUS[record.status], ended))

    # ---- reports

    def _report(self, study: str) -> None:
        path = report_marker(self.main, study)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unless_held(path.with_suffix(".lock")) as ours:
            if ours:
                self._copy_report(study, path)

    def _copy_report(self, study: str, path: Path) -> None:
        """Bring the run of the study's report up to date; the caller holds the report's lock."""
        folder = self.main / "reports" / study
        content = report_content(folder)
        verdict = _json(folder / "verdict.json")
        standing = _json(folder / "stats.json") if (folder / "stats.json").exists() else {}
        marker = read_marker(path, ReportMarker)
        run = self._run_of(marker) if marker and marker.uri == self.shown else None
        written = round(1000 * (folder / "verdict.json").stat().st_mtime)
        if run is None:
            experiment_id = self._experiment(study)
            run = self._find(experiment_id, "kind", "report") or self._patiently(
                lambda: self.client.create_run(
                    experiment_id, start_time=written, tags={"kind": "report", "study": study}, run_name="report"
                )
            )
        run_id = run.info.run_id
        if run.info.lifecycle_stage != "deleted":
            tags = {
                "status": "complete" if verdict["complete"] else "incomplete",
                "mlflow.note.content": verdict["decision"],
                **{f"verdict.{arm}": found["verdict"] for arm, found in verdict["verdicts"].items()},
            }
            for stale in [tag for tag in run.data.tags if tag.startswith("verdict.") and tag not in tags]:
                self._patiently(lambda tag=stale: self.client.delete_tag(run_id, tag))  # type: ignore[misc]
            self._log(run_id, standing_metrics(standing, written), tags)
            for file in report_files(folder):
                within = file.parent.relative_to(folder).as_posix()
                self.client.log_artifact(run_id, str(file), None if within == "." else within)
            self._patiently(lambda: self.client.set_terminated(run_id, "FINISHED", written))
        write_marker(path, ReportMarker(uri=self.shown, run_id=run_id, content=content))


def _set_environment() -> None:
    """Set what MLflow reads from the environment.

    No retries inside MLflow: a request to create a run that was answered too late, repeated blindly, is a second
    run. The next pass repeats it after looking. A person's own timeout is respected.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the address may hold a password
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def parameters(cell: dict[str, Any]) -> dict[str, str]:
    """Parameters of a cell's run: `optimizer` and its options, the workload's settings, the seed."""
    flat = {"seed": cell["seed"], "optimizer": cell["optimizer"]["kind"]}
    flat |= _flattened(cell["optimizer"]["options"], "optimizer")
    flat |= _flattened(cell["settings"], "settings")
    return {key: value if isinstance(value, str) else canonical_json(value) for key, value in flat.items()}


def curve_metrics(rows: Iterable[dict[str, Any]], started: int) -> Iterator[Metric]:
    """Metrics of a curve's rows; `started` in ms since 1970. A validation loss that was not finite is nan."""
    from mlflow.entities import Metric

    for row in rows:
        at = started + round(1000 * (row.get("seconds") or 0.0))
        for key, value in row.items():
            if key == "val_loss" and value is None:
                value = math.nan
            if key in NOT_SERIES or not isinstance(value, int | float):
                continue
            name = (
                f"optimizer/{key.removeprefix(DIAGNOSTIC_PREFIX)}"
                if key.startswith(DIAGNOSTIC_PREFIX)
                else f"curve/{key}"
            )
            yield Metric(name, float(value), at, row["step"])


def standing_metrics(standing: dict[str, Any], at: int) -> Iterator[Metric]:
    """Effect [nats/token, positive: better than the baseline] and E-value of each challenger; `at` in ms since 1970.

    What is undefined is nan, since MLflow would go on showing the value of an earlier version of the report.
    """
    from mlflow.entities import Metric

    for comparison in standing.get("comparisons", ()):
        if comparison["decision"] is not None:
            for name, key in (("effect", "mean_diff"), ("e_value", "e_value")):
                value = comparison["estimates"][key]
                yield Metric(f"{name}/{comparison['arm']}", math.nan if value is None else value, at, 0)


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


def _flattened(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, inner in value.items() for path, leaf in _flattened(inner, f"{name}.{key}").items()}


def _experiment_name(start: dict[str, Any]) -> str:
    return start["record"]["study"] or EXPLORATION


def _milliseconds(iso: str) -> int:
    return round(1000 * datetime.fromisoformat(iso).timestamp())


def _rows(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the rest of a file in which a line was cut short: the record ends its curve there too


def _record(folder: Path) -> RunRecord | None:
    path = folder / "record.json"
    return RunRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
