"""One study half done: the plan says what a run would do and touches nothing, a commit takes results and nothing else.

The tests share the repository, and the later ones change it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import STUDY, TOY_STUDY, Maker, Repository

from muonlab.cli import main
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.plan import Plan, make_plan
from muonlab.pipeline.pool import ThisMachine
from muonlab.pipeline.sharing import commit_results
from muonlab.pipeline.studies import StudyStatus, list_studies, show_study
from muonlab.pipeline.study_run import run_study
from muonlab.registry.errors import IntegrityError, OverBudgetError, UsageError

pytestmark = pytest.mark.slow

TRAIN_SEED_0 = f"""
from muonlab.pipeline.declare import purpose_of
from muonlab.pipeline.attempts import train_cell
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, load_study, study_cells
layout = Layout.find()
params = load_params(layout.params)
write_fingerprints(layout, params)
for cell in study_cells(layout, params, load_study(layout, {STUDY!r})):
    if cell.seed == 0:
        train_cell(layout, cell, purpose_of(layout, cell, {STUDY!r}), data_dir=layout.data("toy"))
"""


@pytest.fixture(scope="module")
def repository(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A paid study of four cells: muon-0 taken over and deleted again, nolah-0 waiting, seed 1 to train."""
    study = {**copy.deepcopy(TOY_STUDY), "price_usd_per_gpu_hour": 2.8, "budget_usd": 5}
    repository = make(tmp_path_factory.mktemp("plan") / "repository", study=study)
    repository.run(sys.executable, "-c", TRAIN_SEED_0)
    (repository.root / "runs" / STUDY / "muon-0").mkdir(parents=True)
    repository.dvc("repro", "-s", f"experiments/{STUDY}/dvc.yaml:train@muon-0")
    shutil.rmtree(repository.root / "runs" / STUDY / "muon-0")
    muon(repository, "study", "status")
    return repository


def muon(repository: Repository, *arguments: str) -> Result:
    """The command in this process, which has imported everything."""
    with contextlib.chdir(repository.root):
        return CliRunner().invoke(main, arguments)


def plan(repository: Repository, *, jobs: int = 2, max_cost_usd: float | None = None) -> Plan:
    return make_plan(Layout.find(repository.root), STUDY, jobs=jobs, max_cost_usd=max_cost_usd)


def everything(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_tells_the_states_apart_and_leaves_every_file_as_it_was(repository: Repository) -> None:
    before = everything(repository.root)
    found = json.loads(muon(repository, "study", "plan", "--json").stdout)
    assert {f"{cell['arm']}-{cell['seed']}": cell["state"] for cell in found["cells"]} == {
        "muon-0": "restored", "nolah-0": "waiting", "muon-1": "to_train", "nolah-1": "to_train",
    }  # fmt: skip
    assert found["counts"] == {"in_place": 0, "restored": 1, "waiting": 1, "to_train": 2}
    assert everything(repository.root) == before
    assert found == json.loads(plan(repository).model_dump_json())


def test_the_run_finds_what_the_plan_says(repository: Repository) -> None:
    found, said = plan(repository), []
    declaration = f"experiments/{STUDY}/study.yaml"
    # The run counts its cells before it finds that the money is spent.
    repository.edit_yaml(declaration, lambda content: content["study"].update(budget_usd=1e-9))
    layout = Layout.find(repository.root)
    with pytest.raises(OverBudgetError):
        run_study(layout, STUDY, place=ThisMachine(layout, 1), watch=lambda steps, cells: print, say=said.append)
    assert plan(repository).over_budget is not None
    repository.git("checkout", "-q", "HEAD", declaration)
    assert said[-1:] == [
        f"{STUDY}: 4 cells, 1 in place or restored from cache, 1 waiting to be taken over, 2 to train."
    ]
    assert [found.counts[state] for state in ("in_place", "restored", "waiting", "to_train")] == [0, 1, 1, 2]


def test_time_and_cost_are_those_of_the_finished_cells(repository: Repository) -> None:
    found = plan(repository)
    records = [row for row in repository.ledger() if row["status"] == "completed"]
    pace = {arm: statistics.median(r["wall_seconds"] / r["final_step"] for r in records if r["arm"] == arm)
            for arm in ("muon", "nolah")}  # fmt: skip
    left = [cell for cell in found.cells if cell.state == "to_train"]
    assert left
    for cell in left:
        assert cell.expected_seconds == pytest.approx(8 * pace[cell.arm])
    seconds = sum(cell.expected_seconds or 0 for cell in left)
    assert found.expected_seconds == pytest.approx(seconds)
    assert found.gpu_hours == pytest.approx(seconds / 3600)
    assert found.expected_cost_usd == pytest.approx(seconds / 3600 * 2.8)
    # The whole study is priced whatever is done of it, and at as many pairs as its plan can come to.
    pair = 8 * (pace["muon"] + pace["nolah"])
    assert (found.whole.runs, found.whole.seconds) == (4, pytest.approx(2 * pair))
    assert found.at_n_max is not None
    assert (found.at_n_max.runs, found.at_n_max.cost_usd) == (24, pytest.approx(12 * pair / 3600 * 2.8))
    assert "Each run on toy: 8 steps of 2 x 32 tokens, on all examples; 1 step of warm-up." in list(found.lines())
    assert found.elapsed_seconds is not None
    assert seconds / 2 <= found.elapsed_seconds <= seconds * (1 + 1e-9)
    assert found.spent_usd == pytest.approx(sum(row["cost_usd"] for row in repository.ledger()))
    assert found.budget_left_usd == pytest.approx(5 - found.spent_usd)


def test_limits_that_do_not_suffice_are_said_with_exit_code_4(repository: Repository) -> None:
    dry = muon(repository, "study", "run", "--dry-run", "--max-cost", "1e-9")
    assert dry.exit_code == 4
    found = plan(repository, max_cost_usd=1e-9)
    assert found.over_budget is not None
    assert "of --max-cost" in found.over_budget
    assert dry.stdout.splitlines() == list(found.lines())


def test_where_nothing_has_run_the_price_is_unknown_not_zero(make: Maker, tmp_path: Path) -> None:
    fresh = make(tmp_path / "fresh")
    found = plan(fresh)
    assert found.counts["to_train"] == 4
    assert found.expected_seconds is None
    assert found.expected_cost_usd is None
    assert "Expected time and cost: unknown: no run of toy is recorded yet." in list(found.lines())
    (fresh.root / "data" / "toy" / "tokens.bin").unlink()
    assert any("The data of toy are not prepared here" in line for line in plan(fresh).lines())


def test_show_and_list_say_what_is_declared_and_whether_it_is_registered(repository: Repository) -> None:
    layout = Layout.find(repository.root)
    card = json.loads(muon(repository, "study", "show", "--json").stdout)
    declared = repository.read(f"experiments/{STUDY}/study.yaml")["study"]
    for key in ("question", "seeds", "workload", "budget_usd", "on_archive"):
        assert card[key] == declared[key]
    assert [(arm["name"], arm["role"]) for arm in card["arms"]] == [("muon", "baseline"), ("nolah", "challenger")]
    assert card["arms"][1]["options"] == {"scale": 0.9, "orthogonalizer": "gram_eigh", "lr": 0.02}
    held = repository.read(f"experiments/{STUDY}/registration.json")["registration"]
    assert card["registration"] == card["declaration"] == held
    assert "it reads the same now." in "\n".join(show_study(layout, STUDY).lines())
    repository.edit_yaml(f"experiments/{STUDY}/study.yaml", lambda c: c["study"]["decision"].update(alpha=0.01))
    assert "it reads otherwise now" in "\n".join(show_study(layout, STUDY).lines())
    repository.git("checkout", "-q", "HEAD", f"experiments/{STUDY}/study.yaml")
    (row,) = list_studies(layout).studies
    assert (row.slug, row.decision, row.verdicts) == (STUDY, None, {})


def test_status_as_json_is_status_in_words(repository: Repository) -> None:
    done = muon(repository, "study", "status", "--json")
    assert done.exit_code == json.loads(done.stdout)["exit_code"] == 3
    found = StudyStatus.model_validate_json(done.stdout)
    said = list(found.lines())
    for cell in found.cells:
        line = next(line for line in said if line.startswith(f"{cell.arm}-{cell.seed} "))
        assert cell.state in line
        assert cell.digest[:12] in line
    assert [(cell.seed, cell.state) for cell in found.cells] == [(0, "completed")] * 2 + [(1, "missing")] * 2


def test_a_commit_holds_results_only_and_leaves_the_index_alone(repository: Repository) -> None:
    layout = Layout.find(repository.root)
    reports = repository.root / "reports" / STUDY
    for name in ("report.md", "figures/losses.svg", "weights.safetensors", "partial.html", "figures/raw.bin"):
        (reports / name).parent.mkdir(parents=True, exist_ok=True)
        (reports / name).write_text("x")
    (repository.root / "staged.py").write_text("x = 1\n")
    repository.git("add", "staged.py")
    (repository.root / "params.yaml").write_text((repository.root / "params.yaml").read_text() + "# tried\n")
    expected = [
        "experiments/001-toy/dvc.lock", "experiments/001-toy/registration.json", "experiments/ledger.jsonl",
        "reports/001-toy/figures/losses.svg", "reports/001-toy/report.md",
    ]  # fmt: skip
    assert commit_results(layout, "dry", dry_run=True).files == expected
    done = json.loads(muon(repository, "commit", "one cell", "--json").stdout)
    assert done["files"] == expected
    assert (
        repository.git("show", "--name-only", "--format=%H %s", "HEAD").split("\n")[0] == f"{done['commit']} one cell"
    )
    assert repository.git("show", "--name-only", "--format=", "HEAD").split() == expected
    assert repository.git("diff", "--cached", "--name-only").split() == ["staged.py"]
    assert commit_results(layout, "again").files == []
    with pytest.raises(UsageError, match="message is empty"):
        commit_results(layout, "  ")


def test_a_ledger_that_lost_a_committed_line_is_not_committed(repository: Repository) -> None:
    layout = Layout.find(repository.root)
    commit_results(layout, "all")
    head = repository.git("rev-parse", "HEAD")
    held = layout.ledger.read_text()
    layout.ledger.write_text("")
    done = muon(repository, "commit", "less")
    assert done.exit_code == IntegrityError.exit_code
    assert "2 committed lines of it would be taken out" in done.stderr
    assert repository.git("rev-parse", "HEAD") == head
    layout.ledger.write_text(held)


def test_outputs_come_back_from_a_remote_and_without_one_a_sentence_says_so(
    repository: Repository, tmp_path: Path
) -> None:
    repository.dvc("checkout", f"experiments/{STUDY}/dvc.yaml:train@muon-0")
    outputs = repository.root / "runs" / STUDY / "muon-0"
    kept = {path.name: path.read_bytes() for path in outputs.iterdir() if path.name != ".gitignore"}
    assert set(kept) >= {"train.json", "curve.csv", "model.safetensors"}
    refused = muon(repository, "download", "--run", "muon-0")
    assert refused.exit_code == 2
    assert "no DVC remote is declared" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    unknown = muon(repository, "download", "--run", f"{STUDY}/muon-9")
    assert (unknown.exit_code, "Did you mean 'muon-" in unknown.stderr) == (2, True)
    repository.dvc("remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    repository.dvc("push", f"experiments/{STUDY}/dvc.yaml:train@muon-0")
    repository.run("rm", "-rf", str(outputs), str(repository.root / ".dvc" / "cache"))
    assert muon(repository, "download", "--run", "muon-0").stdout.strip() == f"runs/{STUDY}/muon-0"
    assert {name: (outputs / name).read_bytes() for name in kept} == kept
    # Of a cell that nobody pushed, the lock file knows nothing.
    absent = muon(repository, "download", "--run", "nolah-1")
    assert absent.exit_code in (2, 3)
    assert "nolah-1" in absent.stderr
