"""One MLflow store, opened safely and asked patiently.

An sqlite file that is not there is made aside and renamed; a locked one is waited for, with a bound. What may be
repeated is repeated here; nothing else is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import uuid4

from filelock import FileLock

from muonlab.tracking.content import EXPLORATION, study_tags, views
from muonlab.tracking.markers import SQLITE, default_uri, sqlite_file, store_is_gone, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Param, Run

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the page of an experiment open on its training runs."""
BATCH = 1000
"""Metrics in one request: the most that MLflow takes. Of parameters and tags it takes 100."""
BATCH_OF_WORDS = 100
LOCKED_TRIES = 4
"""Each waits up to MLflow's own 20 s for the lock of an sqlite file."""
PASSING = ("database is locked", "UNIQUE constraint", "duplicate key value")
"""Signs of a moment: another process holds the sqlite file, or was first (as sqlite and as PostgreSQL say it)."""
STORE_LOCK_S = 60.0

T = TypeVar("T")


class Held(NamedTuple):
    """What a store holds of an attempt."""

    run_id: str
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""
    deleted: bool
    parent: str | None


class Store:
    """The store at `uri`, for the repository `main`."""

    def __init__(self, main: Path, uri: str) -> None:
        self.main = main
        self.uri = uri
        self.shown = without_credentials(uri)
        """The address as it may be shown and kept."""
        self.is_own = uri == default_uri(main)
        """Whether it is the repository's own file, into which nobody else writes."""
        self._experiments: dict[str, str] = {}

    @property
    def was_deleted(self) -> bool:
        """Whether the sqlite file vanished after it was opened: what is written then goes nowhere."""
        return "client" in vars(self) and store_is_gone(self.main, self.uri)

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

    def patiently(self, call: Callable[[], T]) -> T:
        """Make a call that may be repeated again while another process has the sqlite file, or got there first."""
        from mlflow.exceptions import MlflowException

        for left in reversed(range(LOCKED_TRIES)):
            try:
                return call()
            except MlflowException as error:
                passing = any(sign in str(error) for sign in PASSING)
                if not passing or error.error_code == "RESOURCE_ALREADY_EXISTS" or not left:
                    raise
                time.sleep(0.2)
        raise AssertionError("unreachable: the last try returns or raises")

    # ---- reading

    def attempts(self, condition: str = "") -> dict[str, Held]:
        """All runs of attempts by the attempt's id, deleted ones included; `condition` is MLflow's filter."""
        from mlflow.entities import ViewType

        experiments = self._all_pages(
            lambda token: self.client.search_experiments(view_type=ViewType.ALL, page_token=token)
        )
        ids = [experiment.experiment_id for experiment in experiments]
        found = self._all_pages(
            lambda token: self.client.search_runs(
                ids, condition, run_view_type=ViewType.ALL, max_results=BATCH, page_token=token
            )
        )
        return {
            run.data.tags["attempt_id"]: Held(
                run_id=run.info.run_id,
                status=run.info.status,
                deleted=is_deleted(run),
                parent=run.data.tags.get("mlflow.parentRunId"),
            )
            for run in found
            if "attempt_id" in run.data.tags
        }

    def _all_pages(self, page: Callable[[str | None], Any]) -> Iterator[Any]:
        token = None
        while True:
            found = self.patiently(lambda at=token: page(at))  # type: ignore[misc]
            yield from found
            token = found.token
            if not token:
                return

    def run(self, run_id: str) -> Run | None:
        """The run of that id, or None where the store does not have it (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            return self.patiently(lambda: self.client.get_run(run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def find(self, experiment_id: str, tag: str, value: str) -> Run | None:
        """The run of an experiment whose tag has that value, be it a deleted one."""
        from mlflow.entities import ViewType

        found = self.patiently(
            lambda: self.client.search_runs(
                [experiment_id], f"tags.`{tag}` = '{value}'", run_view_type=ViewType.ALL, max_results=1
            )
        )
        return found[0] if found else None

    # ---- writing

    def create_run(self, experiment_id: str, name: str, started: int, tags: dict[str, str]) -> Run:
        """Create a run that began `started` ms after 1970."""
        return self.patiently(
            lambda: self.client.create_run(experiment_id, start_time=started, tags=tags, run_name=name)
        )

    def experiment(self, name: str, started: int) -> str:
        """Id of the experiment of that name, created where there is none, restored where it was deleted.

        A new one of a study has the study's own run in it, which began `started` ms after 1970.
        """
        if name not in self._experiments:
            found = self.patiently(lambda: self.client.get_experiment_by_name(name))
            if found is None:
                self._publish(name, started)
                found = self.patiently(lambda: self.client.get_experiment_by_name(name))
            assert found is not None, "an experiment that exists is found"
            if found.lifecycle_stage == "deleted":
                self.patiently(lambda: self.client.restore_experiment(found.experiment_id))
            for tag, view in views().items():
                if tag not in found.tags:  # one that a person has overwritten stays theirs
                    self.patiently(lambda t=tag, v=view: self.client.set_experiment_tag(found.experiment_id, t, v))  # type: ignore[misc]
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _publish(self, name: str, started: int) -> None:
        """Make an experiment, with its study's run, aside, and rename it: one of those who do so at once comes first.

        No lock reaches the other machines that write to a server, and a name is all that MLflow gives only once.
        """
        from mlflow.exceptions import MlflowException

        # Another store's server decides itself where artifacts go; the file in the repository has no server.
        location = str(self.main.resolve() / "mlartifacts" / name) if self.is_own else None
        aside = f"{name} (being made, {uuid4().hex})"
        made = self.patiently(
            lambda: self.client.create_experiment(aside, artifact_location=location, tags=KIND | views())
        )
        if name != EXPLORATION:
            self.create_run(made, name, started, study_tags(name))
        try:
            self.client.rename_experiment(made, name)
        except MlflowException:
            self.patiently(lambda: self.client.delete_experiment(made))
            if self.client.get_experiment_by_name(name) is None:
                raise

    def log(
        self,
        run_id: str,
        *,
        metrics: Iterable[Metric] = (),
        params: Iterable[Param] = (),
        tags: dict[str, str] | None = None,
    ) -> None:
        """Log in as few requests as MLflow takes; all of it may be repeated."""
        from mlflow.entities import RunTag

        points, words = list(metrics), list(params)
        labels = [RunTag(key, value) for key, value in (tags or {}).items()]
        while points or words or labels:
            first, words = words[:BATCH_OF_WORDS], words[BATCH_OF_WORDS:]
            some, labels = labels[:BATCH_OF_WORDS], labels[BATCH_OF_WORDS:]
            room = BATCH - len(first) - len(some)
            now, points = points[:room], points[room:]
            self.patiently(lambda a=now, b=first, c=some: self.client.log_batch(run_id, a, b, c))  # type: ignore[misc]

    def log_data(self, run_id: str, data: DatasetInput) -> None:
        """Say what data a run was trained on."""
        self.patiently(lambda: self.client.log_inputs(run_id, [data]))

    def log_files(self, run_id: str, files: dict[str, str]) -> None:
        """Keep texts as files of a run, by name; one that is there is replaced."""
        for name, text in files.items():
            self.patiently(lambda n=name, t=text: self.client.log_text(run_id, t, n))  # type: ignore[misc]

    def file_names(self, run_id: str) -> list[str]:
        """Names of the files that a run has."""
        return [file.path for file in self.patiently(lambda: self.client.list_artifacts(run_id))]

    def end(self, run_id: str, status: str, ended: int) -> None:
        """Give a run MLflow's status and its end, `ended` ms after 1970."""
        self.patiently(lambda: self.client.set_terminated(run_id, status, ended))


def is_deleted(run: Run) -> bool:
    """Whether someone deleted the run in MLflow: it is left alone then."""
    return run.info.lifecycle_stage == "deleted"


def _set_environment() -> None:
    """Set what MLflow reads from the environment.

    No retries inside MLflow: a request to create a run that was answered too late, repeated blindly, is a second
    run. The next pass repeats it after looking. A person's own timeout is respected.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the address may hold a password
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
