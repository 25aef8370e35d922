"""Without a DVC remote, `muon download` brings record and curve from MLflow; the record must be the ledger's."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from benchmarks.ledger import make_repository
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.sharing import Downloaded, download
from muonlab.registry import ledger
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.record import RunRecord
from muonlab.tracking.content import CURVE_FILE, RECORD_FILE
from muonlab.tracking.markers import forget, tracking_uri
from muonlab.tracking.sync import Mirror

PROJECT = Path(__file__).parents[2]


def copy_to_mlflow(root: Path) -> None:
    assert Mirror(root, tracking_uri(root)).sync(reports=False, ledger=True) == []


@pytest.mark.slow
def test_record_and_curve_come_from_mlflow_and_are_the_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUONLAB_TRACKING", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository"
    slug = make_repository(root, 100)
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").touch()
    layout = Layout(root, root)
    known, unknown = [r for r in ledger.read(layout.ledger).records if r.study == slug][:2]
    layout.ledger.write_text(ledger.to_line(known) + "\n")
    cell = f"{slug}/{known.arm}-{known.seed}"

    # Nothing is there yet, and asking makes no store.
    with pytest.raises(UsageError, match="no DVC remote is declared and MLflow has no files of its run"):
        download(layout, cell)
    assert not (root / "mlflow.db").exists()

    copy_to_mlflow(root)
    folder = root / "downloads" / cell
    assert download(layout, cell) == Downloaded([], [f"downloads/{cell}"])
    assert RunRecord.model_validate_json((folder / RECORD_FILE).read_text()) == known
    with (folder / CURVE_FILE).open(newline="") as file:
        rows = [(int(row["step"]), float(row["val_loss"])) for row in csv.DictReader(file)]
    assert rows == [(point.step, point.val_loss) for point in known.curve]
    assert download(layout, f"{slug}/*") == Downloaded([], [f"downloads/{cell}"])
    with pytest.raises(UsageError, match="no DVC remote"):
        download(layout, f"{slug}/{unknown.arm}-{unknown.seed}")

    # A run that lacks its files gets them when all is copied again, and is not there twice.
    (kept,) = root.glob(f"mlartifacts/*/*/artifacts/{RECORD_FILE}")
    shutil.rmtree(kept.parent)
    forget(root)
    copy_to_mlflow(root)
    assert list(root.glob(f"mlartifacts/*/*/artifacts/{RECORD_FILE}")) == [kept]
    assert download(layout, cell).without_weights

    kept.write_text(kept.read_text().replace('"final_step": 300', '"final_step": 301'))
    with pytest.raises(IntegrityError, match=f"MLflow's record of the attempt {known.attempt_id} is not the ledger's"):
        download(layout, cell)


def test_neither_git_nor_dvc_looks_into_downloads() -> None:
    for name in (".gitignore", ".dvcignore"):
        assert any(line.strip("/") == "downloads" for line in (PROJECT / name).read_text().splitlines())
