"""Gates and the archive with real runs: what is refused, what an override leaves behind, what a verdict unlocks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import STUDY, TOY_STUDY, Maker, Repository

from muonlab.pipeline.declare import purpose_of
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, resolve_optimizer, resolve_settings
from muonlab.registry.cell import Cell, Inputs
from muonlab.registry.errors import UsageError

THEN, NEXT, AGAIN = "002-then", "003-next", "004-again"
ARCHIVE = "experiments/archived.json"

FIRST_STUDY = {
    **TOY_STUDY,
    # Any difference is far under half of the loss: two pairs make it EQUIVALENT.
    "decision": {"min_effect": "50%", "plan": {"fixed": 2}, "n_min": 2},
    "passes": {"finished": True, "within": "50%"},
}


def declare(repository: Repository, slug: str, **changes: Any) -> None:
    folder = repository.root / "experiments" / slug
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(json.dumps({"study": {**TOY_STUDY, "slug": slug, **changes}}))


@pytest.fixture(scope="module")
def repository(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = make(tmp_path_factory.mktemp("gates") / "repository", study=FIRST_STUDY)
    declare(repository, THEN, requires=[{"study": STUDY, "verdict": "PASSED"}], seeds=[0])
    archived = {"study": STUDY, "verdict": "ARCHIVED", "arm": "nolah"}
    declare(repository, NEXT, baseline="nolah", challengers=["muon"], requires=[archived])
    declare(repository, AGAIN)
    repository.commit("studies")
    return repository


@pytest.fixture(scope="module")
def concluded(repository: Repository) -> Repository:
    """The first study run to its report."""
    repository.muon("study", "run", STUDY, "-j", "1")
    repository.commit("run")
    return repository


def refused(repository: Repository, *arguments: str) -> str:
    """The one sentence with which a command refuses."""
    done = repository.muon(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_a_closed_gate_refuses_run_and_register_and_plan_says_it(repository: Repository) -> None:
    for command in (("study", "run", THEN), ("study", "register", THEN)):
        said = refused(repository, *command)
        assert f"asks for {STUDY} to have passed; found: no report of it yet" in said
        assert "--override" in said
    assert sorted(path.name for path in (repository.root / "experiments" / THEN).iterdir()) == ["study.yaml"]
    assert repository.git("status", "--porcelain") == ""
    plan = json.loads(repository.muon("study", "plan", THEN, "--json").stdout)
    assert f"Gate closed: asks for {STUDY} to have passed; found: no report of it yet." in plan["notes"]
    shown = json.loads(repository.muon("study", "show", THEN, "--json").stdout)
    assert [gate["is_open"] for gate in shown["gates"]] == [False]


def test_a_cell_of_the_grid_asks_in_the_studys_name_and_one_outside_it_asks_nothing(repository: Repository) -> None:
    """`dvc exp run` trains a cell on behalf of a study that `purpose_of` names."""
    layout = Layout(root=repository.root, main=repository.root)
    params = load_params(layout.params)
    inputs = Inputs(data="d", tokenizer="t", code="c", environment="e")
    declared = Cell(
        workload="toy",
        arm="nolah",
        seed=0,
        settings=resolve_settings(params, "toy", "nolah"),
        optimizer=resolve_optimizer(params, "toy", "nolah"),
        inputs=inputs,
    )
    with pytest.raises(UsageError, match=f"asks for {STUDY} to have passed"):
        purpose_of(layout, declared, THEN)
    options = {**declared.optimizer.options, "scale": 0.5}
    tried = declared.model_copy(update={"optimizer": declared.optimizer.model_copy(update={"options": options})})
    assert purpose_of(layout, tried, THEN).study is None
    assert not (repository.root / "experiments" / THEN / "registration.json").exists()


@pytest.mark.slow
def test_what_the_study_came_to_is_said_everywhere(concluded: Repository) -> None:
    verdict = concluded.read(f"reports/{STUDY}/verdict.json")
    assert verdict["verdicts"]["nolah"]["verdict"] == "EQUIVALENT"
    assert verdict["passed"]["verdict"] is True
    assert len(verdict["passed"]["reasons"]) == 2
    status = json.loads(concluded.muon("study", "status", STUDY, "--json").stdout)
    assert status["passed"] == verdict["passed"]
    report = (concluded.root / "reports" / STUDY / "report.md").read_text()
    assert "Pass criterion of the study: passed" in report
    assert f"`muon archive nolah --study {STUDY}`" in report
    assert "EQUIVALENT (criterion: passed)" in (concluded.root / "reports" / "README.md").read_text()


@pytest.mark.slow
def test_the_gate_opens_and_asks_for_no_override(concluded: Repository) -> None:
    concluded.muon("study", "register", THEN, "--override")
    assert concluded.read(f"experiments/{THEN}/registration.json")["overrides"] == []


@pytest.mark.slow
def test_an_archive_takes_the_verdict_of_report_and_evidence_alike(concluded: Repository) -> None:
    path = concluded.root / "reports" / STUDY / "verdict.json"
    true = path.read_text()
    forged = json.loads(true)
    forged["summary"]["challengers"]["nolah"]["verdict"] = "NO_GO"
    path.write_text(json.dumps(forged))
    assert "has nolah NO_GO, and the evidence there is now makes it EQUIVALENT" in refused(
        concluded, "archive", "nolah", "--study", STUDY
    )
    path.write_text(true)
    ledger = concluded.root / "experiments" / "ledger.jsonl"
    held = ledger.read_text()
    edited = held.splitlines()
    edited[0] = edited[0].replace('"attempt":1', '"attempt":2')
    ledger.write_text("\n".join(edited) + "\n")
    assert "now makes it INVALID" in refused(concluded, "archive", "nolah", "--study", STUDY)
    ledger.write_text(held)
    assert not (concluded.root / ARCHIVE).exists()


@pytest.mark.slow
def test_archiving_unlocks_the_next_study_and_closes_those_that_use_the_arm(concluded: Repository) -> None:
    assert "to be archived" in refused(concluded, "study", "run", NEXT)
    done = json.loads(concluded.muon("archive", "nolah", "--study", STUDY, "--json").stdout)
    assert (done["verdict"], done["new"], done["next_method"]) == ("EQUIVALENT", True, "muon")
    # The next study uses the archived arm itself, and has that gate left.
    assert done["unlocked"] == []
    assert list(done["waiting"]) == [NEXT]
    (entry,) = concluded.read(ARCHIVE)
    assert (entry["arm"], entry["study"], entry["verdict"]) == ("nolah", STUDY, "EQUIVALENT")
    assert entry["registration"] == concluded.read(f"experiments/{STUDY}/registration.json")["registration"]
    before = (concluded.root / ARCHIVE).read_bytes()
    assert "nothing was changed" in concluded.muon("archive", "nolah", "--study", STUDY).stdout
    assert (concluded.root / ARCHIVE).read_bytes() == before
    assert "archived as EQUIVALENT by 001-toy" in concluded.muon("study", "show", STUDY).stdout
    assert "archived: nolah" in concluded.muon("study", "list").stdout
    assert "nolah not to be archived" in refused(concluded, "study", "run", AGAIN)


@pytest.mark.slow
def test_an_override_is_recorded_once_and_shown_on_top_of_the_report(concluded: Repository) -> None:
    assert (concluded.root / ARCHIVE).exists(), "the test before archives nolah"
    concluded.muon("study", "run", AGAIN, "--override", "-j", "1")
    path = f"experiments/{AGAIN}/registration.json"
    (override,) = concluded.read(path)["overrides"]
    (sentence,) = override["gates"]
    assert sentence == f"asks for nolah not to be archived; found: it was archived as EQUIVALENT by {STUDY}"
    held = (concluded.root / path).read_bytes()
    concluded.muon("study", "register", AGAIN)
    concluded.muon("study", "register", AGAIN, "--override")
    assert (concluded.root / path).read_bytes() == held
    report = (concluded.root / "reports" / AGAIN / "report.md").read_text()
    assert "> **Started against its gate, by --override on " in report
    # The override is no part of what is hashed: the registration is that of the declaration.
    assert "was edited" not in report


@pytest.mark.slow
def test_an_unarchived_arm_is_free_again(concluded: Repository) -> None:
    (concluded.root / ARCHIVE).unlink(missing_ok=True)
    shown = json.loads(concluded.muon("study", "show", NEXT, "--json").stdout)
    assert [gate["is_open"] for gate in shown["gates"]] == [False]
    assert all(arm["archived"] is None for arm in shown["arms"])
