"""What others report: judged by the golden line, never trained, recorded, registered or counted elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import PROJECT, STUDY, TOY_STUDY, Maker, Repository, make_repository

from muonlab.cli import main
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.reported import reported_snapshot
from muonlab.pipeline.resolve import load_study
from muonlab.registry.errors import UsageError
from muonlab.reporting.standing import Standing, judge

HISTORY = "000-reported-history"


def with_history(repository: Repository) -> Repository:
    shutil.copytree(PROJECT / "experiments" / HISTORY, repository.root / "experiments" / HISTORY)
    repository.commit("history")
    return repository


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which the reported history was read; nothing in it is prepared for training."""
    repository = with_history(make_repository(tmp_path_factory.mktemp("reported") / "repository"))
    done = repository.muon("study", "run", HISTORY)
    assert "2 reported runs read, nothing trained or recorded here" in done.stderr
    assert "nolah: INCONCLUSIVE" in done.stdout
    return repository


def standing_of(repository: Repository) -> Standing:
    path = repository.root / "reports" / HISTORY / "stats.json"
    return Standing.model_validate_json(path.read_text(encoding="utf-8"))


# Origin of the numbers: the protocol's golden line on the reported history, n = 1.


def test_golden_line_in_the_result(reported: Repository) -> None:
    standing = standing_of(reported)
    (comparison,) = standing.comparisons
    e, decision = comparison.estimates, comparison.decision
    assert e.n == 1
    assert e.rel_diff_pct == pytest.approx(0.1021, abs=5e-5)
    assert e.usd_per_pp.point == pytest.approx(68.56, abs=5e-3)
    # Of the evaluations in the first 30% of the steps, step 100 is the one that is not approximate.
    assert e.early_regress == pytest.approx(0.0938, abs=5e-5)
    assert e.e_value == pytest.approx(1.61, abs=5e-3)
    assert decision is not None
    assert decision.verdict == "INCONCLUSIVE"
    assert decision.earliest_go_n == 4
    # One pair has no p, interval or effect size, and no spread from which to predict.
    for name in ("ci95", "rel_ci95_pct", "t", "p_one_sided", "d_z", "g_z", "sd_diff", "mde_80"):
        assert getattr(e, name) is None, name
    assert decision.decision_chance is None
    assert standing.false_go is None


@pytest.mark.parametrize(
    "words",
    [
        "0.1021%",
        "$68.56 per percentage point",
        "9.38% of muon's loss worse, over the limit of 2%",
        "one pair has no spread",
        "33% of the steps saved; it was evaluated every 50 steps, so that anything from above 0% to 67% fits",
        "multiply, here nolah's to 2.59, where 20 is needed",
        "The earliest GO is at 4 pairs ($28.00, about 10.0 h of computing), the plan ends at 12 ($84.00",
        "one pair shows no run-to-run spread",
        "seed not recorded",
        "10 of the 20 points of the curves are approximate",
        "look 0.85 standard deviations of a run too good",
        "nolah ends 0.0007 nats/token better than muon (0.0299% of 2.3409)",
        "8 runs, $16.80 and 6.0 h",
        "the verdict is capped at INCONCLUSIVE",
        "padding was counted in the loss",
    ],
)
def test_golden_line_in_the_report(reported: Repository, words: str) -> None:
    text = (reported.root / "reports" / HISTORY / "report.md").read_text(encoding="utf-8")
    assert words in text.replace("\\", "")


@pytest.mark.parametrize("name", ["report.md", "verdict.json"])
def test_the_committed_report_is_the_one_that_this_code_makes(reported: Repository, name: str) -> None:
    path = f"reports/{HISTORY}/{name}"
    made, committed = ((root / path).read_text(encoding="utf-8") for root in (reported.root, PROJECT))
    assert made == committed, f"muon study run {HISTORY}"


def test_nothing_is_trained_registered_or_recorded(reported: Repository) -> None:
    written = {line[3:] for line in reported.changed("--untracked-files=all")}
    report = f"reports/{HISTORY}/"
    assert {path for path in written if not path.startswith(report)} == {"reports/README.md"}
    assert {"registry.json", "stats.json", "verdict.json", "report.md", "report.html"} <= {
        path.removeprefix(report) for path in written
    }
    # No mark of a DVC stage, which DVC would have to ignore for git.
    assert not [path for path in written if Path(path).name.startswith(".")]


def muon(repository: Repository, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """A command in this process, which saves the seconds of its imports."""
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("MUONLAB_TRACKING", "off")
    return CliRunner().invoke(main, arguments)


def test_reading_it_again_gives_the_same_bytes(reported: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted((reported.root / "reports").rglob("*")) if p.is_file()}

    before = content()
    muon(reported, monkeypatch, "study", "run", HISTORY)
    assert content() == before


def test_the_index_lists_it_as_reported(reported: Repository) -> None:
    text = (reported.root / "reports" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| [{HISTORY}]")]
    for words in (
        "INCONCLUSIVE, guardrail failed, reported, not run here",
        "+0.102%",
        "none: one pair",
        "not recorded",
    ):
        assert words in row
    assert f"[{HISTORY}]: {HISTORY}/report.md" in text
    assert f"- {STUDY}: Does NOLAH beat Muon on a toy? (`muon study run {STUDY}`)" in text


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("study", "register", HISTORY), 2, "provenance is 'reported'"),
        (("study", "status", HISTORY), 0, "seed not recorded"),
        (("study", "list"), 0, "reported, not run here, 2 arms x 1 run on granite-1b-500"),
        (("next", HISTORY), 0, "reported by others; declare a study of provenance run"),
    ],
    ids=["register", "status", "list", "next"],
)
def test_commands_say_what_applies(
    reported: Repository, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], code: int, words: str
) -> None:
    done = muon(reported, monkeypatch, *command)
    assert done.exit_code == code, done.output
    assert words in done.output
    assert not reported.ledger()


def test_other_declarations_keep_their_hash() -> None:
    """A key that only reported studies have is no part of what the others declare, and have registered."""
    layout = Layout(root=PROJECT, main=PROJECT)
    assert "reported" not in load_study(layout, "001-nolah-vs-muon-tiny").declaration()
    assert "reported" in load_study(layout, HISTORY).declaration()


Change = Callable[[Path], None]


def text(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_text(encoding="utf-8")
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1), encoding="utf-8")

    return change


def declared(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = yaml.safe_load((folder / "study.yaml").read_text())
        content["study"].update(changes)
        kept = {"study": {key: value for key, value in content["study"].items() if value is not None}}
        (folder / "study.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))

    return change


LAST = "2.0601661467552184,,75,3.50"
REFUSED: dict[str, tuple[Change, list[str]]] = {
    "no file": (lambda folder: (folder / "finals.csv").unlink(), ["finals.csv: it is missing"]),
    "columns": (text("finals.csv", "final_val_loss", "loss"), ["finals.csv: found the columns", "final_val_loss"]),
    "not a number": (text("finals.csv", LAST, "two,,75,3.50"), ["finals.csv line 9", "final_val_loss", "'two'"]),
    "diverged": (text("finals.csv", LAST, "nan,,75,3.50"), ["finals.csv line 9", "final_val_loss", "finite"]),
    "too many cells": (text("finals.csv", LAST, LAST + ",1"), ["finals.csv line 9"]),
    "too few cells": (text("finals.csv", LAST, "2.06,,75"), ["finals.csv line 9", "cost_usd"]),
    "a seed": (text("finals.csv", "muon,,,500,2.3409", "muon,,3,500,2.3409"), ["line 6", "'3'", "`muon compare`"]),
    "unknown experiment": (text("finals.csv", "granite-350m-500", "granite-350-500"), ["line 6", "granite-350m-500"]),
    "another model": (text("curves.csv", "granite-4.0-h-1b-base", "granite-5"), ["curves.csv line 2", "granite-5"]),
    "other steps": (text("finals.csv", "muon,,,500,2.0622", "muon,,,400,2.0622"), ["line 8", "step 400", "500 steps"]),
    "beyond the end": (text("curves.csv", ",500,2.0622", ",501,2.0622"), ["curves.csv line 11", "step 501"]),
    "two endings": (text("curves.csv", "2.0601661467552184", "2.05"), ["nolah ends at 2.05", "2.0601661467552184"]),
    "a step twice": (text("curves.csv", ",350,2.06,", ",300,2.06,"), ["step 300 of muon", "stands twice"]),
    "plateau": (
        text("finals.csv", "2.3402,100,", "2.3402,120,"),
        ["finals.csv line 7", "120", "every 50 of 500 steps"],
    ),
    "another arm": (
        text("curves.csv", "base,nolah,,500,", "base,adamw,,500,"),
        ["curves.csv", "'adamw'", "muon, nolah"],
    ),
    "two runs": (
        text("finals.csv", LAST, LAST + "\ngranite-1b-500,ibm-granite/granite-4.0-h-1b-base,nolah,,,500,2.0,,75,3.50"),
        ["found 2 runs of 'nolah' in granite-1b-500"],
    ),
    "no run": (text("finals.csv", "granite-1b-500,ibm-granite/granite-4.0-h-1b-base,nolah,gate=tanh", "#"), ["line 9"]),
    "undeclared arm": (declared(challengers=["nohal"]), ["found 0 runs of 'nohal'"]),
    "workload": (declared(workload="tiny"), ["study.yaml", "workload is 'tiny'", "granite-1b-500"]),
    "seeds": (declared(seeds=[0, 1]), ["seeds are [0, 1]", "seeds: [0]", "`muon compare`"]),
    "not described": (declared(reported=None), ["provenance is 'reported'", "'reported' is missing"]),
    "not reported": (declared(provenance="run"), ["provenance is 'run'", "'reported' is there"]),
    "tuning": (declared(kind="tuning", grid={"lr": [1]}), ["kind is 'tuning'", "not tuned"]),
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    shutil.copytree(PROJECT / "experiments" / HISTORY, tmp_path / "experiments" / HISTORY)
    return Layout(root=tmp_path, main=tmp_path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_files_are_refused_in_a_sentence(layout: Layout, name: str) -> None:
    change, words = REFUSED[name]
    change(layout.study(HISTORY))
    with pytest.raises(UsageError) as caught:
        reported_snapshot(layout, load_study(layout, HISTORY), judged_by="")
    said = str(caught.value)
    assert said.startswith(f"experiments/{HISTORY}/")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_an_approximate_point_decides_nothing(layout: Layout) -> None:
    """However bad a point that was not measured is, guardrail and estimates stay; a measured one moves them."""

    def early(change: Change | None = None) -> float | None:
        if change is not None:
            change(layout.study(HISTORY))
        standing = judge(reported_snapshot(layout, load_study(layout, HISTORY), judged_by=""), [])
        return standing.comparisons[0].estimates.early_regress

    before = early()
    assert early(text("curves.csv", ",50,3.2,24.5,true", ",50,9.0,24.5,true")) == before
    # Measured in one arm only, it has nothing to be compared with.
    assert early(text("curves.csv", ",50,9.0,24.5,true", ",50,9.0,24.5,false")) == before
    assert early(text("curves.csv", ",50,2.90,18.2,true", ",50,2.90,18.2,false")) == pytest.approx(6.1 / 2.9)


@pytest.mark.slow
def test_beside_a_study_that_is_run_here(reported: Repository, make: Maker, tmp_path: Path) -> None:
    """The reported runs are in no ledger and no family; the index holds both studies, and DVC stays quiet about it."""
    repository = with_history(make(tmp_path / "repository", study={**TOY_STUDY, "seeds": [0]}))
    shutil.copytree(reported.root / "reports" / HISTORY, repository.root / "reports" / HISTORY)
    repository.muon("study", "run", STUDY)
    assert {row["study"] for row in repository.ledger()} == {STUDY}
    assert len(repository.ledger()) == 2
    snapshot = repository.read(f"reports/{STUDY}/registry.json")
    assert snapshot["left_out"] == snapshot["outside"] == []
    verdict = repository.read(f"reports/{STUDY}/verdict.json")["verdicts"]["nolah"]
    assert verdict["family_size"] == 1

    index = repository.root / "reports" / "README.md"
    content = index.read_text(encoding="utf-8")
    rows = [line for line in content.splitlines() if line.startswith("| [")]
    assert [row.split("]")[0] for row in rows] == [f"| [{HISTORY}", f"| [{STUDY}"]
    assert verdict["verdict"] in rows[1]
    days = {row["started_at"][:10] for row in repository.ledger()}
    assert any(day in rows[1] for day in days)

    repository.commit("ran")
    written = index.stat().st_mtime_ns
    repository.dvc("repro", f"experiments/{STUDY}/dvc.yaml")
    assert index.stat().st_mtime_ns == written
    assert repository.git("status", "--porcelain") == ""
    assert "README.md" not in json.dumps(repository.read(f"experiments/{STUDY}/dvc.yaml"))
