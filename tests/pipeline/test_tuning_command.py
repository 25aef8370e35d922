"""`muon study run` and `muon report` of a tuning study in a real repository, and a comparison that uses its choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import STUDY, Maker, Repository

TUNE = "900-tune"
DIVERGES = 1e30


def declare(repository: Repository, **changes: object) -> None:
    study = {
        "slug": TUNE, "question": "Which learning rate?", "kind": "tuning", "provenance": "run", "workload": "toy",
        "baseline": "muon", "challengers": ["nolah"], "seeds": [1000, 1001], "grid": {"lr": [0.03, 0.3, DIVERGES]},
        "price_usd_per_gpu_hour": 0, "budget_usd": 0, **changes,
    }  # fmt: skip
    folder = repository.root / "experiments" / TUNE
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({"study": study}, sort_keys=False))


@pytest.fixture(scope="module")
def tuned(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose tuning study has run; its choice is not committed yet."""
    repository = make(tmp_path_factory.mktemp("tuned") / "repository")
    declare(repository)
    repository.edit_yaml(f"experiments/{STUDY}/study.yaml", lambda content: content["study"].update(tuning=TUNE))
    repository.commit("tuning")
    done = repository.muon("study", "run", TUNE, "-j", "2", "--json")
    (repository.root / "said.txt").write_text(done.stderr)
    (repository.root / "answer.json").write_text(done.stdout)
    return repository


def copied(tuned: Repository, to: Path) -> Repository:
    shutil.copytree(tuned.root, to, symlinks=True)
    return Repository(to)


def best(repository: Repository, arm: str) -> float:
    """The learning rate with the lowest mean loss, from the ledger's records and nothing of ours."""
    found = [r for r in repository.ledger() if r["study"] == TUNE and r["arm"] == arm]
    assert len(found) == 6
    lines = (repository.root / "experiments" / TUNE / "results.csv").read_text().splitlines()[1:]
    lr_of = {line.split(",")[-1]: float(line.split(",")[1]) for line in lines}
    means = {
        lr: sum(r["val_loss"] for r in found if lr_of[r["cell_digest"]] == lr) / 2
        for lr in (0.03, 0.3)
        if all(r["status"] == "completed" for r in found if lr_of[r["cell_digest"]] == lr)
    }
    return min(means, key=lambda lr: means[lr])


@pytest.mark.slow
def test_a_tuning_study_runs_to_its_report_and_writes_its_choice(tuned: Repository) -> None:
    answer = json.loads((tuned.root / "answer.json").read_text())
    chosen = {arm: {"lr": best(tuned, arm)} for arm in ("muon", "nolah")}
    assert answer["exit_code"] == 0
    assert answer["chosen"] == chosen
    assert tuned.read("params.yaml")["workloads"]["toy"]["tuned"] == chosen
    said = (tuned.root / "said.txt").read_text()
    assert f"Used by {STUDY}." in said
    assert "commit it to declare them" in said
    folder = tuned.root / "reports" / TUNE
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.html", "tuning.json", "figures"}
    report = (folder / "report.md").read_text()
    assert report.count(" diverged |") == 8  # two seeds at 1e30 of both arms, in their row and in the list of such runs
    assert "(2 diverged)" in report
    assert "12 of 12 declared runs have an outcome (4 diverged)" in report
    assert f"[{TUNE}]({TUNE}/report.md): Chosen: lr " in (tuned.root / "reports" / "README.md").read_text()
    listed = tuned.muon("study", "list").stdout
    assert "    Chosen: lr " in listed
    status = tuned.muon("study", "status", TUNE)
    assert len(status.stdout.splitlines()) == 12
    assert "muon-1000 lr 0.03" in status.stdout


@pytest.mark.slow
def test_run_again_it_trains_nothing_and_reported_again_it_says_the_same(tuned: Repository, tmp_path: Path) -> None:
    repository = copied(tuned, tmp_path / "again")
    before = {path: path.read_bytes() for path in sorted((repository.root / "reports" / TUNE).rglob("*.*"))}
    params = (repository.root / "params.yaml").read_bytes()
    again = repository.muon("study", "run", TUNE)
    assert "12 cells, 12 known, 0 to train" in again.stderr
    assert "holds these choices already; nothing was changed" in again.stderr
    repository.muon("report", TUNE)
    assert {path: path.read_bytes() for path in before} == before
    assert (repository.root / "params.yaml").read_bytes() == params


@pytest.mark.slow
def test_a_clone_has_the_report_from_results_alone_and_says_so(tuned: Repository, tmp_path: Path) -> None:
    repository = copied(tuned, tmp_path / "source")
    repository.commit("choice")
    clone = Repository(tmp_path / "clone")
    repository.git("clone", "-q", str(repository.root), str(clone.root))
    (clone.root / "experiments" / "ledger.jsonl").unlink()
    shutil.rmtree(clone.root / "reports" / TUNE)
    assert clone.muon("report", TUNE).stdout.strip() == f"reports/{TUNE}/report.html"
    report = (clone.root / "reports" / TUNE / "report.md").read_text()
    assert "From experiments/900-tune/results.csv, since the ledger has none of these runs" in report
    assert "data of toy are not prepared here" in report
    ours, theirs = (r.read(f"reports/{TUNE}/tuning.json") for r in (repository, clone))
    assert theirs["chosen"] == ours["chosen"]
    assert "chosen and used" in clone.muon("study", "show", STUDY).stdout


@pytest.mark.slow
def test_a_comparison_prints_how_its_arms_were_tuned(tuned: Repository, tmp_path: Path) -> None:
    repository = copied(tuned, tmp_path / "compared")
    repository.commit("choice")
    assert repository.muon("report", STUDY, check=False).returncode == 3  # none of its own runs was made
    report = (repository.root / "reports" / STUDY / "report.md").read_text()
    for arm in ("muon", "nolah"):
        assert (
            f"- {arm}: 6 runs (3 learning rates x 2 seeds) by {TUNE}, lr {best(repository, arm)} chosen and used"
            in report
        )
    snapshot = repository.read(f"reports/{STUDY}/registry.json")
    assert {arm: its["in_use"] for arm, its in snapshot["tuning"].items()} == {"muon": True, "nolah": True}
    results = repository.root / "experiments" / TUNE / "results.csv"
    lines = results.read_text().splitlines(keepends=True)
    loss = lines[1].split(",")[4]
    results.write_text("".join([lines[0], lines[1].replace(loss, "1.5"), *lines[2:]]))
    again = repository.muon("report", STUDY, check=False)
    assert again.returncode == 5
    assert "has the loss 1.5, and the ledger another for the same cell" in again.stderr
    assert "INVALID" in (repository.root / "reports" / STUDY / "report.md").read_text()


@pytest.mark.slow
def test_it_refuses_before_anything_is_written(tuned: Repository, tmp_path: Path) -> None:
    repository = copied(tuned, tmp_path / "refused")
    repository.edit_yaml("params.yaml", lambda content: content["optimizers"].update(mine={"kind": "muon"}))
    before = repository.git("status", "--porcelain")
    refused = repository.muon("study", "run", TUNE, check=False)
    assert refused.returncode == 2
    assert "params.yaml: optimizers.mine.kind differs from the last commit" in refused.stderr
    declare(repository, seeds=[3])
    for command in (("study", "run", TUNE), ("study", "register", TUNE)):
        refused = repository.muon(*command, check=False)
        assert refused.returncode == 2
        assert "can both come to the seed 3 on toy" in refused.stderr
    declare(repository)
    assert repository.git("status", "--porcelain") == before
