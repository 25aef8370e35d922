"""The two doors lead to the same cells: nothing is trained twice, nothing is mixed up, nothing is lost.

Every test counts real trainings (`scratch/*/attempts/*/record.json`), made by real DVC commands in a real repository.
"""

from __future__ import annotations

import json
import resource
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import STUDY, TOY_PARAMS, TOY_STUDY, Maker, Repository

from muonlab.pipeline import doors
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import declared_slugs, load_study
from muonlab.tracking import sync_once, tracking_uri

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
GRID = f"experiments/{STUDY}/dvc.yaml"


def children_seconds() -> float:
    """Processor seconds of all ended child processes: a time that a busy machine does not lengthen much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def lived_in(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One cell trained by `dvc exp run`, then the study of four run by `muon`."""
    repository = make(tmp_path_factory.mktemp("doors") / "repository", tracking=True)
    repository.dvc("exp", "run", "-S", "optimizer=nolah", "-S", "seed=1")
    assert len(repository.attempts()) == 1
    repository.git("checkout", "-q", "HEAD", "params.yaml")
    repository.muon("study", "run", "-j", "2", check=False)
    return repository


def test_the_study_trains_only_what_the_other_door_has_not(lived_in: Repository) -> None:
    assert sorted(f"{r['arm']}-{r['seed']}" for r in lived_in.attempts()) == ["muon-0", "muon-1", "nolah-0", "nolah-1"]
    assert {r["status"] for r in lived_in.attempts()} == {"completed"}
    verdict = lived_in.read(f"reports/{STUDY}/verdict.json")
    assert verdict["complete"] is True
    assert verdict["verdicts"]["nolah"]["verdict"] == "INCONCLUSIVE"


def test_a_cell_of_the_study_is_the_studys_through_either_door(lived_in: Repository) -> None:
    rows = lived_in.ledger()
    assert len(rows) == 4
    assert {row["study"] for row in rows} == {STUDY}
    assert len({row["registration"] for row in rows}) == 1


def test_run_again_it_trains_nothing_and_says_so_in_under_ten_seconds(lived_in: Repository) -> None:
    began = children_seconds()
    done = lived_in.muon("study", "run", check=False)
    took = children_seconds() - began
    assert len(lived_in.attempts()) == 4
    assert "nothing to train: all 4 cells are in place" in done.stderr
    assert took < 10


def test_dvc_repro_finds_nothing_to_train_after_the_study(lived_in: Repository) -> None:
    said = lived_in.dvc("repro", GRID).stdout
    assert "train@muon-0' didn't change" in said
    assert len(lived_in.attempts()) == 4


def test_a_cell_of_the_study_is_restored_by_exp_run(lived_in: Repository) -> None:
    said = lived_in.dvc("exp", "run", "-S", "optimizer=muon", "-S", "seed=0").stdout
    lived_in.git("checkout", "-q", "HEAD", "params.yaml")
    assert "Stage 'train' is cached" in said
    assert len(lived_in.attempts()) == 4
    record = lived_in.read("runs/exp/current/train.json")
    assert (record["arm"], record["seed"]) == ("muon", 0)


def test_pairs_share_their_start_and_nothing_else(lived_in: Repository) -> None:
    rows = {(row["arm"], row["seed"]): row["hashes"] for row in lived_in.ledger()}
    for seed in (0, 1):
        ours, theirs = rows[("muon", seed)], rows[("nolah", seed)]
        assert [ours[key] for key in ("data", "tokenizer", "init", "order")] == [
            theirs[key] for key in ("data", "tokenizer", "init", "order")
        ]
        assert ours["weights"] != theirs["weights"]
    assert rows[("muon", 0)]["init"] != rows[("muon", 1)]["init"]
    assert rows[("muon", 0)]["order"] != rows[("muon", 1)]["order"]


def test_mlflow_shows_one_run_an_attempt_and_the_report(lived_in: Repository) -> None:
    from mlflow.tracking import MlflowClient

    assert sync_once(lived_in.root, 120) is None
    client = MlflowClient(tracking_uri(lived_in.root))
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    cells = [run for run in runs if run.data.tags.get("kind") != "report"]
    assert sorted(run.info.run_name for run in cells) == ["muon/seed-0", "muon/seed-1", "nolah/seed-0", "nolah/seed-1"]
    assert {run.info.status for run in cells} == {"FINISHED"}
    steps = [point.step for point in client.get_metric_history(cells[0].info.run_id, "curve/val_loss")]
    assert sorted(set(steps)) == [0, 2, 4, 6, 8]
    (report,) = [run for run in runs if run.data.tags.get("kind") == "report"]
    names = {item.path.split("/")[-1] for item in client.list_artifacts(report.info.run_id)}
    assert "report.md" in names


def test_an_overridden_cell_is_not_the_declared_one(lived_in: Repository) -> None:
    lived_in.dvc("exp", "run", "-S", "optimizer=nolah", "-S", "seed=0", "-S", "optimizers.nolah.scale=0.95")
    row = lived_in.ledger()[-1]
    declared = next(r for r in lived_in.ledger() if (r["arm"], r["seed"]) == ("nolah", 0) and r["study"] == STUDY)
    assert row["study"] is None
    assert row["cell_digest"] != declared["cell_digest"]
    assert row["val_loss"] != declared["val_loss"]
    assert lived_in.read("reports/exp/verdict.json")["verdicts"]["nolah"]["verdict"] == "INCONCLUSIVE"

    # DVC leaves the value in params.yaml: a study must not take it for the declaration.
    refused = lived_in.muon("study", "run", check=False)
    assert refused.returncode == 2
    assert "'nolah' of 001-toy reads otherwise here than in the last commit" in refused.stderr
    lived_in.git("checkout", "-q", "HEAD", "params.yaml")
    assert lived_in.muon("study", "status").returncode == 0


def test_the_table_of_experiments_is_readable(lived_in: Repository) -> None:
    shown = json.loads(lived_in.dvc("exp", "show", "--json").stdout)
    data = shown[0]["data"]
    assert set(data["metrics"]["runs/exp/current/metrics.json"]["data"]) == {
        "val_loss", "perplexity", "cost_usd", "seconds"
    }  # fmt: skip


def test_a_queue_of_experiments_reaches_the_ledger(repository: Repository) -> None:
    repository.dvc("exp", "run", "--queue", "-S", "optimizer=muon,nolah", "-S", "seed=range(0,2)")
    repository.dvc("queue", "start")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        state = repository.dvc("queue", "status").stdout
        if "Queued" not in state and "Running" not in state:
            break
        time.sleep(2)
    assert state.count("Success") == 4, state
    assert {(r["arm"], r["seed"], r["study"]) for r in repository.ledger()} == {
        (arm, seed, STUDY) for arm in ("muon", "nolah") for seed in (0, 1)
    }
    # And the study takes over what the queue trained.
    repository.muon("study", "run", check=False)
    assert len(repository.attempts()) == 4


def test_a_lock_file_of_another_version_hides_no_cell_that_the_run_cache_holds(
    lived_in: Repository, tmp_path: Path
) -> None:
    """As after `git checkout dvc.lock`: what it says of dependencies and outputs is not what was run last."""
    subprocess.run(["cp", "-a", str(lived_in.root), str(tmp_path / "repository")], check=True)
    repository = Repository(tmp_path / "repository")
    repository.git("checkout", "-q", "HEAD", "params.yaml")
    lock = repository.root / f"experiments/{STUDY}/dvc.lock"
    content = yaml.safe_load(lock.read_text())
    for stage in content["stages"].values():
        for entry in (*stage.get("deps", ()), *stage.get("outs", ())):
            if "/data/toy" not in entry["path"]:
                entry["md5"] = entry["md5"][::-1]
    lock.write_text(yaml.safe_dump(content, sort_keys=False))
    before = len(repository.attempts())
    done = repository.muon("study", "run", check=False)
    assert "4 in place or restored" in done.stderr, done.stderr
    assert len(repository.attempts()) == before


def test_twenty_studies_cost_exp_run_little(lived_in: Repository, tmp_path: Path) -> None:
    """Outside of its stages, `dvc exp run` stays under ten seconds with twenty declared studies."""
    subprocess.run(["cp", "-a", str(lived_in.root), str(tmp_path / "repository")], check=True)
    repository = Repository(tmp_path / "repository")
    repository.git("checkout", "-q", "HEAD", "params.yaml")
    layout = Layout(root=repository.root, main=repository.root)
    for number in range(2, 21):
        slug = f"{number:03d}-more"
        folder = layout.study(slug)
        folder.mkdir()
        study = {**TOY_STUDY, "slug": slug, "seeds": list(range(12))}
        (folder / "study.yaml").write_text(json.dumps({"study": study}))
        doors.write_grid(layout, load_study(layout, slug))
    repository.commit("twenty studies")
    # All stages that can be are cached: what is left is DVC, and the stages that always run.
    stages = ("fingerprint", "collect 001-toy exp", "stats exp", "report exp")
    began = children_seconds()
    for stage in stages:
        repository.run("python", "-m", *(f"stages.{stage}".split()))
    in_stages = children_seconds() - began
    began = children_seconds()
    repository.dvc("exp", "run", "-S", "seed=1")
    assert children_seconds() - began - in_stages < 10


def test_the_default_grid_file_is_what_its_declaration_makes() -> None:
    layout = Layout(root=PROJECT, main=PROJECT)
    # A rehearsal's grid is there once it was run; that of any other study with its declaration.
    grids = {path.parent.name for path in PROJECT.glob("experiments/*/dvc.yaml")}
    for slug in sorted(grids | set(declared_slugs(layout))):
        study = load_study(layout, slug)
        if study.kind == "comparison" and study.provenance == "run":
            assert (layout.study(slug) / "dvc.yaml").read_text() == doors.grid_text(study)
    assert "001-nolah-vs-muon-tiny" in doors.open_studies(layout)


def test_every_door_runs_the_same_command_on_the_same_paths() -> None:
    """DVC's run cache is keyed by these; one character's difference would train every cell twice."""
    exp = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]["train"]
    layout = Layout(root=PROJECT, main=PROJECT)
    grid = yaml.safe_load(doors.grid_text(load_study(layout, "001-nolah-vs-muon-tiny")))["stages"]["train"]
    names = {"${optimizer}": "${item.arm}", "${seed}": "${item.seed}", "${workload}": "tiny"}

    def renamed(value: str) -> str:
        for ours, theirs in names.items():
            value = value.replace(ours, theirs)
        return value

    for key in ("cmd", "deps", "params", "outs"):
        assert json.loads(renamed(json.dumps(exp[key]))) == grid[key]
    depth = grid["wdir"].replace("../../", "", 1).count("/")
    assert exp["wdir"].count("/") == depth


def test_toy_params_are_in_the_shape_of_the_real_ones() -> None:
    real = yaml.safe_load((PROJECT / "params.yaml").read_text())
    assert set(real) == set(TOY_PARAMS)
