"""Edited evidence never ends in a quiet verdict: each attack through the command line, on a finished study."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import STUDY, Maker, Repository

from muonlab.registry import ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = make(tmp_path_factory.mktemp("evidence") / "repository")
    repository.muon("study", "run", check=False)
    repository.commit("results")
    return repository


@pytest.fixture
def repository(done: Repository, tmp_path: Path) -> Repository:
    copied = tmp_path / "repository"
    subprocess.run(["cp", "-a", str(done.root), str(copied)], check=True)
    return Repository(copied)


def test_untouched_it_has_a_verdict(repository: Repository) -> None:
    assert repository.muon("study", "run", check=False).returncode == 0


def test_an_edited_ledger_is_invalid(repository: Repository) -> None:
    path = repository.root / "experiments/ledger.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = lines[0].replace(f'"val_loss":{row["val_loss"]}', '"val_loss":1.0')
    path.write_text("\n".join(lines) + "\n")
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 5
    assert "line 1 was edited" in done.stderr
    assert "INVALID" in done.stdout


def test_a_ledger_edited_with_its_hash_is_invalid_too(repository: Repository) -> None:
    path = repository.root / "experiments/ledger.jsonl"
    held = ledger.read(path).records
    better = held[0].model_copy(update={"val_loss": 1.0})
    path.write_text("".join(ledger.to_line(r) + "\n" for r in [better, *held[1:]]))
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 5
    assert "one of the two was edited" in done.stderr


def test_a_deleted_row_comes_back(repository: Repository) -> None:
    path = repository.root / "experiments/ledger.jsonl"
    before = sorted(path.read_text().splitlines())
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 0
    assert sorted(path.read_text().splitlines()) == before
    assert "put back from git's history" in done.stderr


def test_edited_evaluations_are_invalid(repository: Repository) -> None:
    path = repository.root / f"reports/{STUDY}/evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["val_loss"] -= 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    repository.run("python", "-m", "stages.stats", STUDY)
    assert repository.read(f"reports/{STUDY}/verdict.json")["verdicts"]["nolah"]["verdict"] == "INVALID"


def test_a_changed_declaration_is_an_amended_plan(repository: Repository) -> None:
    repository.edit_yaml(
        f"experiments/{STUDY}/study.yaml", lambda content: content["study"]["decision"].update(min_effect="9%")
    )
    repository.muon("study", "run", check=False)
    assert repository.read(f"reports/{STUDY}/verdict.json")["amended"] is True
    assert "plan amended" in (repository.root / f"reports/{STUDY}/report.md").read_text()


def test_a_lost_run_is_missing_not_skipped(repository: Repository) -> None:
    repository.edit_yaml(f"experiments/{STUDY}/study.yaml", lambda content: content["study"].update(seeds=[0, 1, 2]))
    done = repository.muon("study", "status", check=False)
    assert done.returncode == 3
    assert "nolah-2" in done.stdout
    assert "missing" in done.stdout


def test_a_rerun_under_changed_code_is_not_a_second_chance(repository: Repository) -> None:
    path = repository.root / "optim/nolah.py"
    path.write_text(path.read_text() + "\nEXTRA = 1\n")
    repository.commit("another nolah")
    done = repository.muon("study", "run", check=False)
    assert done.returncode == 5
    assert "recorded in this study under other inputs (code" in done.stderr


def test_a_comment_changes_no_cell(repository: Repository) -> None:
    path = repository.root / "optim/nolah.py"
    path.write_text("# a comment\n" + path.read_text())
    before = len(repository.attempts())
    assert repository.muon("study", "run", check=False).returncode == 0
    assert len(repository.attempts()) == before
