"""Runs carry over to changed code that makes their steps again bit for bit, and to no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import STUDY, Maker, Repository
from test_pipeline_evidence import another_torch

pytestmark = pytest.mark.slow

LOOP = "muonlab/training/loop.py"
LEARNING_RATE = 'warmup=group["warmup"]) * group["initial_lr"]'


@pytest.fixture(scope="module")
def refactored(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A finished study, and after it a commit that renames a function of the training loop."""
    repository = make(tmp_path_factory.mktemp("accept") / "repository")
    repository.muon("study", "run")
    repository.commit("results")
    rewrite(repository, "_rms_change", "_rms_of_change")
    repository.commit("rename")
    return repository


@pytest.fixture
def repository(refactored: Repository, tmp_path: Path) -> Repository:
    subprocess.run(["cp", "-a", str(refactored.root), str(tmp_path / "repository")], check=True)
    return Repository(tmp_path / "repository")


def rewrite(repository: Repository, before: str, after: str) -> None:
    path = repository.root / LOOP
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def refused(repository: Repository, code: int, words: str, *options: str) -> None:
    """`muon accept` must end with this code, say these words in one sentence, and leave the ledger alone."""
    before = repository.ledger()
    done = repository.muon("accept", *options, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr.splitlines()[-1], done.stderr
    assert repository.ledger() == before


def test_a_refactoring_carries_all_runs_over_and_nothing_is_trained(repository: Repository) -> None:
    attempts, ledger = repository.attempts(), repository.ledger()
    loss = repository.read(f"reports/{STUDY}/stats.json")["comparisons"][0]["estimates"]["mean_diff"]
    done = repository.muon("accept", "--dry-run")
    assert "2 runs would be trained again, about" in done.stdout
    assert "muon-0 (the first 2 of 8), nolah-0 (the first 2 of 8)" in done.stdout
    assert repository.ledger() == ledger
    assert repository.git("status", "--porcelain") == ""

    found = json.loads(repository.muon("accept", "--json").stdout)
    assert found["carried"] == ["muon-0", "nolah-0", "muon-1", "nolah-1"]
    row = repository.ledger()[-1]
    assert (row["schema_version"], row["command"]) == (2, f"muon accept {STUDY}")
    assert row["provenance"]["commit"] == repository.git("rev-parse", "HEAD").strip()
    assert [(r["steps"], r["rows"], r["loss_compared"], r["difference"]) for r in row["retrained"]] == [
        (2, 2, True, None)
    ] * 2
    assert {c["from_digest"] for c in row["carried"]} == {r["cell_digest"] for r in ledger}
    # Records and outputs stay what they are.
    assert repository.ledger()[:-1] == ledger

    plan = json.loads(repository.muon("study", "plan", "--json").stdout)
    assert plan["counts"] == {"in_place": 4, "restored": 0, "waiting": 0, "to_train": 0}
    done = repository.muon("study", "run")
    assert "4 in place or restored from cache, 0 waiting to be taken over, 0 to train" in done.stderr
    assert repository.attempts() == attempts
    assert repository.read(f"reports/{STUDY}/stats.json")["comparisons"][0]["estimates"]["mean_diff"] == loss
    report = (repository.root / f"reports/{STUDY}/report.md").read_text()
    assert "the first 2 of 8 steps of muon-0 and nolah-0 were trained again by the code that there is now" in report
    assert "What acts only in other cells, or after these steps, was not compared" in report
    assert "Other code: 4 runs here were made by other code" in report

    # Asked again, the ledger answers.
    assert json.loads(repository.muon("accept", "--json").stdout)["compared"] == []
    assert len(repository.ledger()) == len(ledger) + 1


def test_a_bit_of_difference_carries_nothing_and_is_remembered(repository: Repository) -> None:
    rewrite(repository, LEARNING_RATE, f"{LEARNING_RATE} * (1.0 if self.step < 4 else 1.0000001)")
    refused(repository, 2, f"{LOOP} is not as committed; commit it first")
    repository.commit("only after step 4")
    before = repository.ledger()
    done = repository.muon("accept", "--steps", "6", check=False)
    assert done.returncode == 5
    sentence, spent = done.stdout.splitlines()
    assert spent.startswith("The comparison took ")
    assert sentence.startswith(f"{STUDY}: muon-0: at step 6 lr is 0.0065000006")
    assert "recorded 0.0065" in sentence
    assert sentence.endswith("the code here computes otherwise, and nothing is carried over.")
    (row,) = repository.ledger()[len(before) :]
    assert row["carried"] == []
    assert row["retrained"][0]["difference"] in sentence
    assert repository.git("status", "--porcelain").split() == ["M", "experiments/ledger.jsonl"]

    # Fewer steps, in which it does not show, are no second chance; nor are they after one more change.
    refused(repository, 5, "this code was compared before, and came out otherwise", "--steps", "4", "--dry-run")
    rewrite(repository, "_rms_of_change", "_rms_of_the_change")
    repository.commit("another name")
    refused(repository, 2, "differed within 6 steps; compare at least as many", "--steps", "4", "--dry-run")
    status = repository.muon("study", "status", check=False)
    assert status.returncode == 5
    assert f"`muon accept {STUDY}`" in status.stderr


def test_what_is_not_code_is_never_accepted(repository: Repository) -> None:
    another_torch(repository)
    refused(repository, 2, "was recorded in another environment", "--dry-run")
    subprocess.run(["rm", "-r", str(repository.root / "torch-9.9.dist-info")], check=True)
    repository.edit_yaml("params.yaml", lambda params: params["optimizers"]["nolah"].update(scale=0.95))
    repository.commit("another nolah")
    refused(repository, 2, "nolah-0 was recorded with other options of nolah", "--dry-run")


def test_edited_files_are_no_evidence(repository: Repository) -> None:
    path = repository.root / f"runs/{STUDY}/nolah-1/curve.csv"
    text = path.read_text()
    path.unlink()
    path.write_text(text + "9,,,,,,,\n")
    refused(repository, 5, "nolah-1: its files are not those that its training left", "--dry-run")


def test_code_of_another_folder_is_not_what_is_compared(repository: Repository, refactored: Repository) -> None:
    # -P: as the installed `muon` does, which does not look in the folder where it is run.
    elsewhere = {"PYTHONPATH": str(refactored.root)}
    done = repository.run(sys.executable, "-P", "-m", "muonlab.cli", "accept", check=False, **elsewhere)
    assert done.returncode == 2
    assert f"muonlab: this command runs the code in {refactored.root}" in done.stderr
