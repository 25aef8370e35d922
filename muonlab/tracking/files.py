"""Record and curve of a finished run, brought back from MLflow, where no DVC remote has its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.record import RunRecord
from muonlab.tracking import is_off
from muonlab.tracking.content import CURVE_FILE, RECORD_FILE
from muonlab.tracking.markers import store_is_gone, tracking_uri
from muonlab.tracking.store import Store


def bring_files(main: Path, records: Iterable[RunRecord], into: Path) -> RunRecord | None:
    """Write train.json and curve.csv of the first of these runs whose files MLflow has into the folder `into`.

    Returns its record, or None where MLflow is switched off or has none of them. Raises IntegrityError where the record
    that MLflow has is not the ledger's, which is the one that was given; UsageError where it cannot be reached.
    """
    uri = tracking_uri(main)
    if is_off() or store_is_gone(main, uri):
        return None
    # The clients would go on asking for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow.exceptions import MlflowException

    try:
        return _bring(Store(main, uri), records, into)
    except MlflowException as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(
            f"MLflow at {uri} does not answer ({reason}); start it, or name another by MLFLOW_TRACKING_URI."
        ) from None


def _bring(store: Store, records: Iterable[RunRecord], into: Path) -> RunRecord | None:
    for record in records:
        held = store.attempts(f"tags.attempt_id = '{record.attempt_id}'").get(record.attempt_id)
        if held is None or held.deleted or not {RECORD_FILE, CURVE_FILE} <= set(store.file_names(held.run_id)):
            continue
        into.mkdir(parents=True, exist_ok=True)
        for name in (RECORD_FILE, CURVE_FILE):
            store.client.download_artifacts(held.run_id, name, str(into))
        if RunRecord.model_validate_json((into / RECORD_FILE).read_text(encoding="utf-8")) != record:
            raise IntegrityError(
                f"{into}: MLflow's record of the attempt {record.attempt_id} is not the ledger's; one was edited."
            )
        return record
    return None
