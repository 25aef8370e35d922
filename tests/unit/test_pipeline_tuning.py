"""A tuning study from its declaration to what a comparison reads: refusals, results.csv, the choice in params.yaml."""

from __future__ import annotations

import copy
import csv
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reporting_studies import record

from muonlab.pipeline import study_run
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.new_study import new_study
from muonlab.pipeline.resolve import check_study, declared_slugs, load_params, load_study
from muonlab.pipeline.studies import list_studies, show_study
from muonlab.pipeline.tuning import consequences, report_tuning, write_choices
from muonlab.pipeline.tuning_checks import check_seeds, check_tuning, refuse_mixed, users_of
from muonlab.pipeline.tuning_results import arm_tunings, disagreements, read_results, write_results
from muonlab.registry import ledger
from muonlab.registry.errors import UsageError

PROJECT = Path(__file__).parents[2]
TUNE, STUDY = "900-tune", "001-one"

PARAMS: dict[str, Any] = {
    "optimizer": "muon",
    "seed": 0,
    "workload": "tiny",
    "study": STUDY,
    "optimizers": {"muon": {"nesterov": True}, "nolah": {"scale": 0.9}, "adamw": {}},
    "workloads": {
        name: {"settings": {"steps": 60}, "tuned": {arm: {"lr": 0.02} for arm in ("muon", "nolah", "adamw")}}
        for name in ("tiny", "large")
    },
}
TUNING: dict[str, Any] = {
    "slug": TUNE, "question": "Which?", "kind": "tuning", "workload": "tiny", "baseline": "muon",
    "challengers": ["nolah"], "seeds": [1000, 1001], "grid": {"lr": [0.01, 0.02]},
    "price_usd_per_gpu_hour": 0, "budget_usd": 0,
}  # fmt: skip
COMPARISON: dict[str, Any] = {
    "slug": STUDY, "question": "Better?", "workload": "tiny", "baseline": "muon", "challengers": ["nolah"],
    "seeds": [0, 1], "decision": {"min_effect": "0.5%"}, "price_usd_per_gpu_hour": 0, "budget_usd": 0, "tuning": TUNE,
}  # fmt: skip
LOSSES = {
    ("muon", 0.01): (4.1, 4.2),
    ("muon", 0.02): (4.0, 4.1),
    ("nolah", 0.01): (4.3, 4.4),
    ("nolah", 0.02): (5.0, 5.1),
}


def declare(root: Path, study: dict[str, Any]) -> None:
    folder = root / "experiments" / study["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({"study": study}, sort_keys=False))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A tree with a tuning study and a comparison that names it; no data, no code, no ledger: a new clone."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    declare(tmp_path, TUNING)
    declare(tmp_path, COMPARISON)
    return Layout(root=tmp_path, main=tmp_path)


def rows(digest: str = "d") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "lr", "seed", "status", "val_loss", "wall_seconds", "cost_usd", "cell_digest"])
    for (arm, lr), losses in LOSSES.items():
        for seed, loss in zip((1000, 1001), losses, strict=True):
            writer.writerow([arm, lr, seed, "completed", loss, 5.0, 0.0, f"{digest}-{arm}-{lr}-{seed}"])
    return text.getvalue()


def check(layout: Layout, slug: str) -> None:
    study = load_study(layout, slug)
    check_study(load_params(layout.params), study)
    check_tuning(layout, study)
    check_seeds(layout, study)


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(base), **changes}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such study": (
        changed(COMPARISON, tuning="900-tun"),
        "unknown tuning study '900-tun'. Did you mean '900-tune'? Allowed: 900-tune, untuned.",
    ),
    "a comparison": (changed(COMPARISON, tuning="002-two"), "'002-two' is a comparison, and its runs choose nothing"),
    "another workload": (
        changed(COMPARISON, workload="large"),
        "900-tune tunes on the workload tiny, and this study runs on large",
    ),
    "its seeds": (
        changed(COMPARISON, first_seed=995, seeds=[995, 996]),
        "can both come to the seeds 1000, 1001 on tiny",
    ),
    "a seed, whoever tuned": (
        changed(COMPARISON, first_seed=1001, seeds=[1001], tuning="untuned"),
        "can both come to the seed 1001 on tiny",
    ),
    "a rehearsal's": (
        changed(COMPARISON, twins={"small": {"workload": "large", "seeds": 2, "tuning": TUNE}}),
        "study.twins.small.tuning: 900-tune tunes on the workload tiny",
    ),
    "a tuning study's": (changed(TUNING, tuning="901-tune"), "a tuning study chooses its arms' options itself"),
    "a comparison's seeds": (changed(TUNING, seeds=[3, 1000]), "can both come to the seed 3 on tiny"),
    "an unknown option": (
        changed(TUNING, grid={"lr": [0.01], "scal": [0.9]}),
        "unknown option of 'muon' (kind muon) 'scal'",
    ),
    "another kind's option": (
        changed(TUNING, grid={"lr": [0.01], "alpha": [0.1]}),
        "unknown option of 'muon' (kind muon) 'alpha'",
    ),
    "out of range": (
        changed(TUNING, grid={"lr": [0.01, -0.02]}),
        "study.grid: 'muon' at lr -0.02: optimizer 'muon': option 'lr' is -0.02",
    ),
    "one combination": (
        changed(TUNING, grid={"lr": [0.01], "momentum": [0.9, 1.0]}),
        "'muon' at lr 0.01, momentum 1.0",
    ),
    "not a number": (changed(TUNING, grid={"lr": [0.01, float("inf")]}), "found inf; it should be a finite number"),
    "no learning rate": (changed(TUNING, grid={"momentum": [0.9]}), "'muon' has no learning rate in it"),
    "twice": (changed(TUNING, grid={"lr": [0.01, 0.01]}), "the value 0.01 stands twice"),
    "set already": (
        changed(TUNING, grid={"lr": [0.01], "nesterov": [True]}),
        "params.yaml sets 'nesterov' in optimizers.muon, where no choice",
    ),
    "a twin's grid": (
        changed(TUNING, twins={"small": {"workload": "large", "seeds": 2, "grid": {"lr": [-1]}}}),
        "'muon' at lr -1",
    ),
}


@pytest.mark.parametrize(("study", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_tuned_or_compared_fairly_is_refused_in_a_sentence(
    layout: Layout, study: dict[str, Any], sentence: str
) -> None:
    for slug in (TUNE, STUDY):
        check(layout, slug)
    declare(layout.root, changed(COMPARISON, slug="002-two", tuning="untuned"))
    declare(layout.root, study)
    with pytest.raises(UsageError) as refused:
        check(layout, study["slug"])
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(f"experiments/{study['slug']}/study.yaml: study.")
    assert "\n" not in str(refused.value)


def test_seeds_may_be_the_same_on_another_workload(layout: Layout) -> None:
    declare(layout.root, changed(TUNING, slug="901-tune", workload="large", seeds=[0, 1]))
    check(layout, "901-tune")
    check(layout, STUDY)


def test_every_study_of_the_project_is_tuned_on_seeds_that_it_does_not_use() -> None:
    project = Layout(root=PROJECT, main=PROJECT)
    for slug in declared_slugs(project):
        if load_study(project, slug).provenance == "run":
            check(project, slug)


def test_results_are_read_as_they_were_written(layout: Layout) -> None:
    path = layout.study(TUNE) / "results.csv"
    study = load_study(layout, TUNE)
    assert read_results(layout, study) is None
    path.write_text(rows())
    runs = read_results(layout, study)
    assert runs is not None
    assert [(r.arm, r.seed, r.options["lr"]) for r in runs[:3]] == [
        ("muon", 1000, 0.01),
        ("muon", 1000, 0.02),
        ("nolah", 1000, 0.01),
    ]
    assert {(r.arm, r.options["lr"]): r.val_loss for r in runs if r.seed == 1001} == {
        k: v[1] for k, v in LOSSES.items()
    }
    write_results(layout, study, runs)
    assert path.read_text() == rows()
    lines = rows().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("completed,4.1", "diverged,"), *lines[3:]]))
    again = read_results(layout, study)
    assert again is not None
    assert sorted(r.state for r in again) == ["completed"] * 6 + ["diverged", "missing"]


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "columns": (lambda t: t.replace("lr", "LR", 1), "found the columns"),
    "arm": (
        lambda t: t.replace("muon,0.01,1000", "moun,0.01,1000"),
        "line 2: arm is 'moun', and the study declares muon, nolah",
    ),
    "value": (
        lambda t: t.replace("muon,0.01,1000", "muon,0.03,1000"),
        "line 2: lr is '0.03', and the study declares 0.01, 0.02",
    ),
    "seed": (lambda t: t.replace("muon,0.01,1000", "muon,0.01,7"), "line 2: seed is '7'"),
    "twice": (lambda t: t + t.splitlines(keepends=True)[1], "muon with lr 0.01, seed 1000, stands there twice"),
    "status": (lambda t: t.replace("completed,4.1,", "failed,4.1,", 1), "no run ends as 'failed'"),
    "no loss": (lambda t: t.replace("completed,4.1,", "completed,,", 1), "no run ends as 'completed' with the loss ''"),
    "not finite": (lambda t: t.replace("completed,4.1,", "completed,nan,", 1), "with the loss 'nan'"),
    "not a number": (lambda t: t.replace("completed,4.1,", "completed,low,", 1), "could not convert"),
    "cells": (lambda t: t.replace("completed,4.1,", "completed,4.1,1,1,1,", 1), "another number of cells"),
}


@pytest.mark.parametrize(("broken", "sentence"), BROKEN.values(), ids=BROKEN)
def test_results_that_no_run_left_are_refused_with_the_line(
    layout: Layout, broken: Callable[[str], str], sentence: str
) -> None:
    path = layout.study(TUNE) / "results.csv"
    path.write_text(broken(rows()))
    with pytest.raises(UsageError) as refused:
        read_results(layout, load_study(layout, TUNE))
    assert sentence in str(refused.value)
    assert "`muon study run 900-tune` makes it anew" in str(refused.value)
    with pytest.raises(UsageError, match=r"results\.csv"):
        check(layout, STUDY)  # before anything is run for a comparison that would read it


def test_a_row_that_the_ledger_has_otherwise_is_found(layout: Layout) -> None:
    (layout.study(TUNE) / "results.csv").write_text(rows())
    study = load_study(layout, TUNE)
    runs = read_results(layout, study)
    assert runs is not None
    records = [edited(run.digest, run.val_loss) for run in runs]
    assert disagreements(study, runs, records) == []
    (found,) = disagreements(study, runs, [edited(runs[0].digest, 3.9), *records[1:]])
    assert "muon with lr 0.01, seed 1000, has the loss 4.1, and the ledger another" in found


def edited(digest: str, loss: float | None) -> Any:
    return record("muon", 1000, loss).model_copy(update={"cell_digest": digest})


def test_what_a_comparison_reads_of_its_tuning(layout: Layout) -> None:
    params, study = load_params(layout.params), load_study(layout, STUDY)
    assert arm_tunings(layout, params, study) == ({}, [])
    (layout.study(TUNE) / "results.csv").write_text(rows())
    found, _ = arm_tunings(layout, params, study)
    assert {arm: (its.runs, its.chosen, its.in_use, its.at_edge) for arm, its in found.items()} == {
        "muon": (4, {"lr": 0.02}, True, ["lr"]),
        "nolah": (4, {"lr": 0.01}, False, ["lr"]),  # params.yaml has 0.02
    }
    (layout.study(TUNE) / "results.csv").write_text("".join(rows().splitlines(keepends=True)[:-1]))
    found, _ = arm_tunings(layout, params, study)
    assert {arm: (its.runs, its.chosen, its.in_use) for arm, its in found.items()} == {
        "muon": (4, {}, False),
        "nolah": (3, {}, False),
    }
    assert [user.slug for user in users_of(layout, TUNE)] == [STUDY]


def test_a_comparison_starts_only_with_what_its_tuning_has_chosen(layout: Layout) -> None:
    """900-tune chooses 0.02 for muon and 0.01 for nolah; params.yaml has 0.02 for both."""
    params = load_params(layout.params)
    (none,) = study_run.obstacles(layout, params, load_study(layout, STUDY))
    assert none.startswith(f"experiments/{STUDY}/study.yaml: study.tuning: 900-tune has no results yet")
    assert "`muon study run 900-tune` first" in none
    with pytest.raises(UsageError, match="has no results yet"):
        study_run.check(layout, STUDY)
    assert f"It cannot start yet: {none}" in show_study(layout, STUDY).lines()
    results = layout.study(TUNE) / "results.csv"
    results.write_text("".join(rows().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match="900-tune lacks some of its results"):
        study_run.check(layout, STUDY)
    results.write_text(rows())
    with pytest.raises(UsageError) as refused:
        study_run.check(layout, STUDY)
    assert "900-tune chose lr 0.01 for nolah, which runs with lr 0.02; `muon study run 900-tune`" in str(refused.value)
    assert "muon" not in str(refused.value).split(";")[0].split("chose")[1]
    write_choices(layout.params, "tiny", {"nolah": {"lr": 0.01}})
    study_run.check(layout, STUDY)
    assert list(study_run.obstacles(layout, load_params(layout.params), load_study(layout, STUDY))) == []


def test_untuned_asks_for_nothing_and_a_comparison_with_results_may_end(layout: Layout) -> None:
    layout.ledger.parent.mkdir(exist_ok=True)
    ledger.append(layout.ledger, [record("muon", 0, 4.0, study=STUDY)])
    study_run.check(layout, STUDY)
    layout.ledger.unlink()
    declare(layout.root, changed(COMPARISON, tuning="untuned"))
    study_run.check(layout, STUDY)


def test_a_rehearsal_asks_for_its_own_tuning(layout: Layout) -> None:
    grid = {"lr": [0.01, 0.02]}
    declare(layout.root, changed(TUNING, slug="901-tune", workload="large", seeds=[1000], grid=grid))
    twins = {"small": {"workload": "large", "seeds": 2, "tuning": "901-tune"}}
    declare(layout.root, changed(COMPARISON, tuning="untuned", twins=twins))
    study_run.check(layout, STUDY)
    with pytest.raises(UsageError, match=r"study\.twins\.small\.tuning: 901-tune has no results yet"):
        study_run.check(layout, f"{STUDY}-small")


def test_what_would_make_a_run_refuse_is_known_before(layout: Layout) -> None:
    """What `muon study plan` says in notes: seeds that tuning saw, and changes that the choice would be mixed with."""
    declare(layout.root, changed(COMPARISON, first_seed=1001, seeds=[1001], tuning="untuned"))
    commit(layout)
    params = copy.deepcopy(PARAMS)
    params["optimizers"]["mine"] = {"kind": "muon"}
    layout.params.write_text(yaml.safe_dump(params))
    here = load_params(layout.params)
    (shared,) = study_run.obstacles(layout, here, load_study(layout, STUDY))
    assert "can both come to the seed 1001 on tiny" in shared
    both = list(study_run.obstacles(layout, here, load_study(layout, TUNE)))
    assert both[0].split(": ")[-1] == shared.split(": ")[-1]
    assert both[1].startswith("params.yaml: optimizers.mine.kind differs from the last commit")


def test_who_has_results_with_other_values_is_told_what_a_new_choice_means(layout: Layout) -> None:
    study = load_study(layout, TUNE)
    assert list(consequences(layout, study, ["muon"])) == [f"Used by {STUDY}."]
    layout.ledger.parent.mkdir(exist_ok=True)
    ledger.append(layout.ledger, [record("muon", 0, 4.0, study=STUDY)])
    used, amended = consequences(layout, study, ["muon"])
    assert amended.startswith(f"muon: {STUDY} has results with the values that stood there before")
    assert list(consequences(layout, study, [])) == [used]
    declare(layout.root, changed(COMPARISON, tuning="untuned"))
    assert "No study uses them yet" in " ".join(consequences(layout, study, ["muon"]))


def test_a_clone_without_a_ledger_reports_from_the_committed_results(layout: Layout) -> None:
    with pytest.raises(UsageError, match="nothing of it has been prepared or run here yet"):
        report_tuning(layout, TUNE)
    (layout.study(TUNE) / "results.csv").write_text(rows())
    standing = report_tuning(layout, TUNE)
    assert {r.arm: r.choice.options for r in standing.arms if r.choice} == {"muon": {"lr": 0.02}, "nolah": {"lr": 0.01}}
    assert standing.in_params == {"muon": "committed", "nolah": "other"}
    text = (layout.reports(TUNE) / "report.md").read_text()
    assert "the data of tiny are not prepared here" in text
    assert "`muon study run 900-tune` writes the choice for nolah into params.yaml" in text
    assert "Chosen: lr 0.02 for muon; lr 0.01 for nolah." in (layout.root / "reports" / "README.md").read_text()
    (row,) = (row for row in list_studies(layout).studies if row.slug == TUNE)
    assert str(row.decision).startswith("Chosen: lr 0.02 for muon")
    said = "\n".join(show_study(layout, STUDY).lines())
    assert "muon: 4 runs (2 learning rates x 2 seeds) by 900-tune, lr 0.02 chosen and used" in said
    assert "nolah: untuned as it runs here, 4 runs (2 learning rates x 2 seeds) by 900-tune chose lr 0.01" in said
    assert load_params(layout.params).workloads["tiny"].tuned["nolah"] == {"lr": 0.02}  # a report chooses nothing


def test_the_choice_is_written_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (PROJECT / "params.yaml").read_text()
    path.write_text(text)
    arms = yaml.safe_load(text)["workloads"]["tiny"]["tuned"]
    write_choices(path, "tiny", {arm: {"lr": 0.0421} for arm in arms})
    pairs = [(a, b) for a, b in zip(text.splitlines(), path.read_text().splitlines(), strict=True) if a != b]
    assert len(pairs) == len(arms)
    assert all("lr: " in a and "lr: 0.0421" in b for a, b in pairs)
    write_choices(path, "tiny", {"muon": {"lr": 0.5, "momentum": 0.9}})
    assert load_params(path).workloads["tiny"].tuned["muon"] == {"lr": 0.5, "momentum": 0.9}


def commit(layout: Layout) -> None:
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=layout.root, check=True)
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", *who, "commit", "-qm", "x"], cwd=layout.root, check=True)


OWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda p: None,
    "its own choice": lambda p: p["workloads"]["tiny"]["tuned"]["muon"].update(lr=0.5),
    "its own, for an arm that had none": lambda p: p["workloads"]["tiny"]["tuned"].pop("nolah"),
    "the one cell": lambda p: p.update(optimizer="nolah", seed=3),
}
OTHERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another arm's": (
        lambda p: p["workloads"]["tiny"]["tuned"]["adamw"].update(lr=0.5),
        "workloads.tiny.tuned.adamw.lr",
    ),
    "another option": (
        lambda p: p["workloads"]["tiny"]["tuned"]["muon"].update(momentum=0.5),
        "workloads.tiny.tuned.muon.momentum",
    ),
    "another workload's": (
        lambda p: p["workloads"]["large"]["tuned"]["muon"].update(lr=0.5),
        "workloads.large.tuned.muon.lr",
    ),
    "an optimizer": (lambda p: p["optimizers"].update(mine={"kind": "muon"}), "optimizers.mine.kind"),
    "a setting": (lambda p: p["workloads"]["large"]["settings"].update(steps=61), "workloads.large.settings.steps"),
}


@pytest.mark.parametrize("change", OWN.values(), ids=OWN)
def test_its_own_choice_and_the_one_cell_are_no_other_change(
    layout: Layout, change: Callable[[dict[str, Any]], Any]
) -> None:
    commit(layout)
    params = copy.deepcopy(PARAMS)
    change(params)
    layout.params.write_text(yaml.safe_dump(params))
    refuse_mixed(layout, load_study(layout, TUNE))


@pytest.mark.parametrize(("change", "named"), OTHERS.values(), ids=OTHERS)
def test_a_choice_is_not_mixed_with_what_was_not_committed(
    layout: Layout, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    commit(layout)
    params = copy.deepcopy(PARAMS)
    change(params)
    layout.params.write_text(yaml.safe_dump(params))
    with pytest.raises(UsageError) as refused:
        refuse_mixed(layout, load_study(layout, TUNE))
    assert str(refused.value).startswith(f"params.yaml: {named} differs from the last commit")


def new(layout: Layout, slug: str, **changes: Any) -> Path:
    asked = {
        "kind": "tuning", "baseline": "muon", "challengers": ("nolah",), "question": "Which?", "min_effect": None,
        "grid": ("lr=0.005,1e-2,0.02", "momentum=0.9,0.95"), "tuning": "untuned", "workload": "tiny", "seeds": None,
        "price": 0.0, "budget": 0.0,
    }  # fmt: skip
    return new_study(layout, slug, **{**asked, **changes})


def test_a_tuning_study_is_declared_by_one_line(layout: Layout) -> None:
    folder = new(layout, "902-new")
    study = load_study(layout, "902-new")
    assert (study.kind, study.seeds, study.decision) == ("tuning", [1000, 1001], None)
    assert study.grid == {"lr": [0.005, 0.01, 0.02], "momentum": [0.9, 0.95]}
    assert "Which?" in (folder / "README.md").read_text()
    assert not (folder / "dvc.yaml").exists()
    shutil.rmtree(folder)
    new(layout, "003-new", kind="comparison", grid=(), min_effect="0.5%", tuning=TUNE)
    assert load_study(layout, "003-new").tuning == TUNE


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": ()}, "--grid: a tuning study needs one"),
        ({"grid": ("lr",)}, "--grid: found 'lr'; it should be OPTION=VALUE,VALUE"),
        ({"grid": ("lr=0.1", "lr=0.2")}, "--grid: 'lr' is given twice"),
        ({"grid": ("lr=fast",)}, "'muon' at lr fast"),
        ({"min_effect": "0.5%"}, "--min-effect: a tuning study decides nothing"),
        ({"tuning": TUNE}, "--tuning: a tuning study decides nothing and tunes itself"),
        ({"kind": "comparison", "min_effect": "0.5%"}, "--grid: a comparison compares arms as they are configured"),
        ({"kind": "comparison", "grid": ()}, "--min-effect: a comparison needs it"),
        ({"kind": "comparison", "grid": (), "min_effect": "0.5%", "tuning": "900"}, "unknown tuning study '900'"),
    ],
)
def test_a_declaration_that_makes_no_sense_writes_nothing(
    layout: Layout, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as refused:
        new(layout, "902-new", **changes)
    assert sentence in str(refused.value)
    assert not (layout.root / "experiments" / "902-new").exists()
