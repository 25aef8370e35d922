"""A study is rehearsed on a small workload: everything lies under the twin's slug, and nothing reads as a decision.

The tests share the repository, and the later ones change it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import TOY_PARAMS, TOY_STUDY, Maker, Repository

from muonlab.cli import main
from muonlab.pipeline.collect import collect
from muonlab.pipeline.doors import grid_text, open_studies
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.sharing import commit_results
from muonlab.registry.ledger import append, read

pytestmark = pytest.mark.slow

PARENT, TWIN = "010-big", "010-big-tiny"


def muon(repository: Repository, *arguments: str) -> Result:
    """The command in this process, which has imported everything."""
    with contextlib.chdir(repository.root):
        return CliRunner(env={"MUONLAB_TRACKING": "off"}).invoke(main, arguments)


@pytest.fixture(scope="module")
def repository(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A paid study on a workload that is never prepared, rehearsed once on the toy."""
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["big"] = copy.deepcopy(params["workloads"]["toy"])
    params["workloads"]["big"]["settings"]["steps"] = 100000
    params["study"] = PARENT
    study = {
        **copy.deepcopy(TOY_STUDY),
        "slug": PARENT,
        "workload": "big",
        "seeds": [0, 1, 2],
        "price_usd_per_gpu_hour": 2.8,
        "budget_usd": 5,
        "twins": {"tiny": {"workload": "toy", "seeds": 1}},
    }
    repository = make(tmp_path_factory.mktemp("twins") / "repository", params=params, study=study)
    return repository


@pytest.fixture(scope="module")
def by_parts(repository: Repository) -> tuple[Result, list[str], Result]:
    """The rehearsal in two part-runs: the first, the stages of DVC that it left behind, the second."""
    first = muon(repository, "study", "run", PARENT, "--workload", "tiny", "--only", "muon-*")
    locked = list(yaml.safe_load((repository.root / "experiments" / TWIN / "dvc.lock").read_text())["stages"])
    second = muon(repository, "study", "run", PARENT, "--workload", "tiny", "--only", "n*-0", "--only", "*-0")
    return first, locked, second


@pytest.fixture
def rehearsed(repository: Repository, by_parts: tuple[Result, list[str], Result]) -> Repository:
    """The repository with its rehearsal concluded."""
    assert by_parts[2].exit_code == 0, by_parts[2].output
    return repository


def test_a_part_run_trains_what_it_is_asked_to_and_the_last_one_concludes(
    repository: Repository, by_parts: tuple[Result, list[str], Result]
) -> None:
    first, locked, second = by_parts
    assert first.exit_code == 3
    assert f"{TWIN}: 1 cell left to be trained elsewhere, or by `muon study run {TWIN}`: nolah-0." in first.stderr
    assert "nolah: INCOMPLETE, rehearsal" in first.stdout
    assert locked == ["train@muon-0"]
    assert second.exit_code == 0
    assert "nolah: INCONCLUSIVE, rehearsal" in second.stdout
    assert f"{TWIN}: trained 1 cells, 1 in place or restored" in second.stderr
    assert len(repository.ledger()) == 2


def test_a_pattern_without_a_cell_is_refused(repository: Repository) -> None:
    for command in (["run"], ["run", "--dry-run"]):
        refused = muon(repository, "study", *command, PARENT, "--workload", "tiny", "--only", "muom-0")
        assert refused.exit_code == 2
        assert "--only: 'muom-0' matches no cell" in refused.stderr
        assert "Did you mean 'muon-0'?" in refused.stderr


def test_all_of_it_lies_under_the_twins_slug(rehearsed: Repository) -> None:
    assert {(r["study"], r["workload"], r["seed"]) for r in rehearsed.ledger()} == {(TWIN, "toy", 0)}
    folder = rehearsed.root / "experiments" / TWIN
    assert {path.name for path in folder.iterdir()} == {"dvc.yaml", "dvc.lock", "registration.json"}
    layout = Layout.find(rehearsed.root)
    assert (folder / "dvc.yaml").read_text() == grid_text(load_study(layout, TWIN))
    assert open_studies(layout) == [PARENT, TWIN]
    registered = json.loads((folder / "registration.json").read_text())["declaration"]["study"]
    assert (registered["slug"], registered["twin_of"], registered["budget_usd"]) == (TWIN, PARENT, 0)
    assert not (rehearsed.root / "reports" / PARENT).exists()
    assert not (rehearsed.root / "experiments" / PARENT / "registration.json").exists()


def test_no_page_of_it_reads_as_a_decision(rehearsed: Repository) -> None:
    report = (rehearsed.root / "reports" / TWIN / "report.md").read_text()
    head = report.split("\n## ")[0]
    assert f"Rehearsal of {PARENT}, no decision: INCONCLUSIVE on nolah." in head
    assert f"It decides nothing about {PARENT}, whatever a verdict below says." in head
    assert f"Nothing follows from a rehearsal: `muon study plan {PARENT}`" in head
    assert "| INCONCLUSIVE, rehearsal |" in report
    for word in ("archive", "adopt", "pivot", "add seeds"):
        assert word not in head.lower()
    verdict = rehearsed.read(f"reports/{TWIN}/verdict.json")
    assert verdict["twin_of"] == verdict["summary"]["twin_of"] == PARENT
    assert verdict["decision"].startswith(f"A rehearsal on the workload toy, which decides nothing about {PARENT}: ")
    index = (rehearsed.root / "reports" / "README.md").read_text()
    assert "No study has a verdict yet." in index
    row = index.split("## Rehearsals")[1].split(f"[{TWIN}]")[1]
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["nolah", "INCONCLUSIVE, rehearsal"]
    assert f"- {PARENT}: " in index.split("## Declared, without a report")[1]


def test_the_commands_stand_for_the_twin(rehearsed: Repository) -> None:
    plan = muon(rehearsed, "study", "plan", "--workload", "tiny")
    assert "2 in place" in plan.stdout
    assert f"A rehearsal of {PARENT}" in plan.stdout
    assert "no price" in plan.stdout or "none is declared" in plan.stdout
    shown = json.loads(muon(rehearsed, "study", "show", PARENT, "--workload", "tiny", "--json").stdout)
    assert (shown["slug"], shown["twin_of"], shown["seeds"]) == (TWIN, PARENT, [0])
    status = muon(rehearsed, "study", "status", TWIN)
    assert status.exit_code == 0
    assert "INCONCLUSIVE, rehearsal: " in status.stdout
    advice = json.loads(muon(rehearsed, "next", PARENT, "--workload", "tiny", "--json").stdout)
    assert (advice["stop"], advice["seeds"], advice["commands"]) == (True, [], [])
    assert muon(rehearsed, "report", "--workload", "tiny").stdout == f"reports/{TWIN}/report.html\n"
    registered = muon(rehearsed, "study", "register", PARENT, "--workload", "tiny")
    assert f"experiments/{TWIN}/registration.json" in registered.stdout
    again = muon(rehearsed, "study", "run", PARENT, "--workload", "tiny")
    assert "nothing to train: all 2 cells are in place" in again.stderr
    part = json.loads(muon(rehearsed, "study", "run", TWIN, "--only", "m*", "--dry-run", "--json").stdout)
    assert {(cell["arm"], cell["seed"]) for cell in part["cells"]} == {("muon", 0)}


def test_the_list_shows_it_under_its_study(rehearsed: Repository) -> None:
    lines = muon(rehearsed, "study", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [PARENT]
    assert lines[-1] == "    rehearsal tiny: nolah INCONCLUSIVE; it decides nothing"
    (row,) = json.loads(muon(rehearsed, "study", "list", "--json").stdout)["studies"]
    assert row["rehearsals"] == {"tiny": {"nolah": "INCONCLUSIVE"}}
    assert row["decision"] is None


def test_a_commit_takes_its_grid(rehearsed: Repository) -> None:
    found = commit_results(Layout.find(rehearsed.root), "rehearsed", dry_run=True).files
    assert {f"experiments/{TWIN}/{name}" for name in ("dvc.yaml", "dvc.lock", "registration.json")} <= set(found)


@pytest.mark.parametrize("command", ["show", "plan", "run", "status", "register"])
def test_an_unknown_name_lists_the_declared_ones(rehearsed: Repository, command: str) -> None:
    refused = muon(rehearsed, "study", command, PARENT, "--workload", "tinny")
    assert refused.exit_code == 2
    assert "unknown twin 'tinny'. Did you mean 'tiny'? Allowed: tiny." in refused.stderr


def declare(repository: Repository, slug: str, text: str = "", **changes: object) -> Path:
    folder = repository.root / "experiments" / slug
    folder.mkdir(exist_ok=True)
    study = {**copy.deepcopy(TOY_STUDY), "slug": slug, **changes}
    (folder / "study.yaml").write_text(text + yaml.safe_dump({"study": study}, sort_keys=False))
    return folder / "study.yaml"


def test_the_results_of_one_study_pick_the_challenger_of_another(rehearsed: Repository) -> None:
    """The selecting study has its results from the ledger: its cells are those of the rehearsal."""
    declare(rehearsed, "011-selects", seeds=[0])
    confirming = {"selected_from": "011-selects", "seeds": [20, 21], "first_seed": 20, "challengers": ["muon-b"]}
    path = declare(rehearsed, "012-confirms", "# kept\n", **confirming)
    early = muon(rehearsed, "study", "plan", "012-confirms")
    assert early.exit_code == 2
    assert "`muon study select 012-confirms` writes the one that they pick" in early.stderr
    done = muon(rehearsed, "study", "select", "012-confirms", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (loss,) = [r["val_loss"] for r in rehearsed.ledger() if r["arm"] == "nolah"]
    assert (found["picked"], found["seeds"], found["changed"]) == ("nolah", 1, True)
    assert found["means"] == {"nolah": pytest.approx(loss)}
    assert path.read_text().startswith("# kept\nstudy:\n  slug: 012-confirms\n")
    study = load_study(Layout.find(rehearsed.root), "012-confirms")
    assert study.challengers == ["nolah"]
    selected = collect(Layout.find(rehearsed.root), "012-confirms").selection
    assert selected is not None
    assert (selected.study, selected.out_of, selected.picked) == ("011-selects", 1, None)
    again = muon(rehearsed, "study", "select", "012-confirms")
    assert "nolah: the lowest mean final loss of 1 challenger of 011-selects, over 1 seed." in again.stdout
    assert "it declares nolah already" in again.stdout


def test_nothing_is_picked_while_a_run_is_missing_or_after_the_first_result(rehearsed: Repository) -> None:
    declare(rehearsed, "011-selects", seeds=[0, 1])
    path = declare(rehearsed, "012-confirms", selected_from="011-selects", seeds=[20], first_seed=20)
    before = path.read_bytes()
    early = muon(rehearsed, "study", "select", "012-confirms")
    assert early.exit_code == 2
    assert "experiments/011-selects: 2 of 4 declared runs have an outcome (2 missing), and it selects only" in (
        early.stderr
    )
    declare(rehearsed, "011-selects", seeds=[0])
    ledger = Layout.find(rehearsed.root).ledger
    changed = {"study": "012-confirms", "seed": 20, "cell_digest": "c" * 64, "attempt_id": "another"}
    append(ledger, [read(ledger).records[0].model_copy(update=changed)])
    late = muon(rehearsed, "study", "select", "012-confirms")
    assert late.exit_code == 2
    assert "it has results, so that its challengers stay as they were registered" in late.stderr
    assert path.read_bytes() == before
    for slug, says in ((TWIN, f"`muon study select {PARENT}`"), (PARENT, "it names no study")):
        refused = muon(rehearsed, "study", "select", slug)
        assert refused.exit_code == 2
        assert says in refused.stderr


def test_the_one_cell_can_be_of_a_twin(rehearsed: Repository) -> None:
    rehearsed.edit_yaml("params.yaml", lambda content: content.update(study=TWIN))
    shown = muon(rehearsed, "study", "show", "--json")
    assert json.loads(shown.stdout)["slug"] == TWIN
