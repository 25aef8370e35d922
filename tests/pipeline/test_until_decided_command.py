"""`muon study run --until-decided` ends where the study with all these seeds declared at once ends.

One paid study is stopped by a limit of cost, and goes on until it is decided; a copy of it declares the same seeds from
the beginning. The tests read what the fixture has left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import STUDY, Maker, Repository

pytestmark = pytest.mark.slow

DECLARATION = f"experiments/{STUDY}/study.yaml"
AS_WRITTEN = f"""\
study:
  slug: {STUDY}
  question: "Does NOLAH beat Muon on a toy?"
  workload: toy
  baseline: muon
  challengers: [ nolah ]
  seeds: [0, 1]   # a prefix
  decision: {{min_effect: 0.5%,  n_min: 2, n_max: 4}}   # declared first
  price_usd_per_gpu_hour: 3600   # a dollar a second
  budget_usd: 100000
"""
REGISTRATION = f"experiments/{STUDY}/registration.json"
EDITED = "stages/train.py"


def run(repository: Repository, *options: str) -> tuple[int, dict[str, Any], str]:
    done = repository.muon("study", "run", "--json", "-j", "1", *options, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def steps(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of a study's runs, one after the other, and the repositories that they leave."""
    folder = tmp_path_factory.mktemp("until")
    repository = make(folder / "repository")
    (repository.root / DECLARATION).write_text(AS_WRITTEN)
    repository.commit("declared")
    at_once = Repository(folder / "at_once")
    repository.run("cp", "-a", str(repository.root), str(at_once.root))
    found: dict[str, Any] = {"repository": repository, "at_once": at_once}
    found["stopped"] = run(repository, "--until-decided", "--max-cost", "0.001")
    found["partial"] = (repository.root / f"reports/{STUDY}/report.md").read_text()
    found["lost"] = repository.ledger()
    found["registered"] = repository.read(REGISTRATION)
    # From here on the tree is dirty, by a file that changes no run.
    (repository.root / EDITED).write_text((repository.root / EDITED).read_text() + "# a remark\n")
    found["decided"] = run(repository, "--until-decided")
    (at_once.root / DECLARATION).write_text((repository.root / DECLARATION).read_text())
    found["whole"] = run(at_once)
    return found


def verdict(repository: Repository) -> Mapping[str, Any]:
    found: Mapping[str, Any] = repository.read(f"reports/{STUDY}/verdict.json")
    return found


def results(repository: Repository) -> list[dict[str, Any]]:
    """The ledger's results, without what no two runs share: names, times, costs, kills and the state of the tree."""
    apart = {"attempt", "attempt_id", "started_at", "wall_seconds", "cost_usd", "computing", "provenance", "sha256",
             "resumed_from_step"}  # fmt: skip
    rows = [{k: v for k, v in r.items() if k not in apart} for r in repository.ledger() if r["status"] == "completed"]
    return sorted(rows, key=lambda row: (row["seed"], row["arm"]))


def test_a_limit_of_cost_stops_it_with_code_4_and_a_report_of_what_there_is(steps: dict[str, Any]) -> None:
    code, answer, said = steps["stopped"]
    assert (code, answer["exit_code"]) == (4, 4)
    assert "has reached the limit of $0.00" in answer["over_budget"]
    assert answer["over_budget"] in said
    assert answer["verdicts"]["nolah"]["verdict"] == "INCOMPLETE"
    (look,) = answer["looks"]
    assert (look["seeds_added"], look["cost_usd"] > 0) == ([], True)
    assert steps["partial"].startswith("# INCOMPLETE")
    assert steps["lost"]
    assert {row["status"] for row in steps["lost"]} <= {"abandoned", "completed"}


def test_it_adds_the_seeds_says_so_and_ends_at_a_verdict(steps: dict[str, Any]) -> None:
    code, answer, said = steps["decided"]
    assert code == 0
    first, *_, last = answer["looks"]
    added = [seed for look in answer["looks"] for seed in look["seeds_added"]]
    assert (first["pairs"], first["verdicts"]) == (2, {"nolah": "INCONCLUSIVE"})
    assert (last["pairs"], last["seeds_added"]) == (2 + len(added), [])
    assert last["verdicts"]["nolah"] == answer["verdicts"]["nolah"]["verdict"]
    assert last["verdicts"]["nolah"] != "INCONCLUSIVE" or last["pairs"] == 4
    # What was trained before the limit stopped it is kept.
    assert answer["trained"] + steps["stopped"][1]["trained"] == 2 * (2 + len(added))
    for words in ("predictive chance of", f"experiments/{STUDY}/study.yaml: seed", "the registration stays", "$"):
        assert words in said
    repository: Repository = steps["repository"]
    seeds = ", ".join(map(str, [0, 1, *added]))
    assert (repository.root / DECLARATION).read_text() == AS_WRITTEN.replace("[0, 1]", f"[{seeds}]")
    assert repository.read(REGISTRATION) == steps["registered"]
    assert not answer["doubts"]


def test_its_looks_cost_what_was_tried_for_them_and_the_study_all_attempts(steps: dict[str, Any]) -> None:
    _, answer, _ = steps["decided"]
    every = sum(row["cost_usd"] for row in steps["repository"].ledger())
    before = sum(row["cost_usd"] for row in steps["lost"])
    assert sum(look["cost_usd"] for look in answer["looks"]) == pytest.approx(every - before)
    assert steps["stopped"][1]["looks"][0]["cost_usd"] == pytest.approx(before)
    assert answer["cost_usd"] == pytest.approx(every)


def test_a_dirty_tree_is_said_recorded_and_reported(steps: dict[str, Any]) -> None:
    _, _, said = steps["decided"]
    (sentence,) = [line for line in said.splitlines() if "the tree is dirty" in line]
    assert f"{EDITED} is not as committed" in sentence
    repository: Repository = steps["repository"]
    later = [row for row in repository.ledger() if row not in steps["lost"]]
    hashes = {row["provenance"]["diff_sha256"] for row in later}
    assert {row["provenance"]["diff_sha256"] for row in steps["lost"]} == {None}
    (hashed,) = hashes
    assert hashed[:12] in sentence
    assert f"hash of the git diff: {hashed[:12]}" in (repository.root / f"reports/{STUDY}/report.md").read_text()
    assert "dirty" not in steps["stopped"][2]


def test_it_ends_where_the_study_with_all_seeds_declared_at_once_ends(steps: dict[str, Any]) -> None:
    by_loop, at_once = steps["repository"], steps["at_once"]
    assert results(by_loop) == results(at_once) != []
    assert by_loop.read(REGISTRATION)["registration"] == at_once.read(REGISTRATION)["registration"]
    ours, theirs = verdict(by_loop)["verdicts"]["nolah"], verdict(at_once)["verdicts"]["nolah"]
    assert {k: v for k, v in ours.items() if "cost" not in k} == {k: v for k, v in theirs.items() if "cost" not in k}
