"""The price of a study before any run: from the declared pace, or the pace of like runs; and whether it buys a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from reporting_studies import record

from muonlab.pipeline.attempts import CellScratch
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.price import (
    Pace,
    by_run_length,
    price_at_n_max,
    price_of_study,
    refuse_small_budget,
    size_text,
    too_small_a_budget,
)
from muonlab.pipeline.processes import device_name
from muonlab.pipeline.reach import go_notes, pairs_paid_for
from muonlab.pipeline.running import ended_attempts
from muonlab.pipeline.study_run import check
from muonlab.registry.errors import UsageError
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Workload, WorkloadSettings
from muonlab.registry.study import Study
from muonlab.stats.evidence import first_attainable_n

ROWS = [
    {"up_to_steps": 50, "batch_size": 4, "examples": 1000},
    {"up_to_steps": 500, "batch_size": 8, "examples": 10000},
    {"batch_size": 16, "examples": 100000},
]
"""Up to 50 steps, up to 500, longer: the batch and data of the original runs at 350M."""


def workload(steps: int = 500, *, pace: bool = True, **settings: Any) -> Workload:
    declared = {"seconds_per_step": 9.5, "source": "the original runs, one H100"}
    content = {"steps": steps, "by_run_length": ROWS, "data": {"sequence_length": 512}, **settings}
    return Workload.model_validate({"settings": content, "pace": declared if pace else None})


def study(**changes: Any) -> Study:
    return Study.model_validate(
        {
            "slug": "001-x", "question": "?", "workload": "large", "baseline": "muon",
            "challengers": ["nolah", "orthonoise"], "control": ["isotropic"], "reference": ["adamw"],
            "seeds": [0, 1, 2, 3, 4], "decision": {"min_effect": "0.5%", "n_max": 12},
            "price_usd_per_gpu_hour": 2.8, "budget_usd": 100, **changes,
        }
    )  # fmt: skip


def run(arm: str, seconds_a_step: float, *, steps: int = 500, batch: int = 8, **changes: Any) -> RunRecord:
    here = record(arm, 0, 4.0).provenance.model_copy(update={"device": changes.pop("device", device_name())})
    return record(arm, 0, 4.0).model_copy(
        update={
            "study": "000-other", "workload": "large", "final_step": steps, "tokens": steps * batch * 512,
            "wall_seconds": seconds_a_step * steps, "provenance": here, **changes,
        }
    )  # fmt: skip


def test_the_price_of_the_original_plan_follows_from_its_declared_pace() -> None:
    """9.5 s a step at $2.80 an hour: 500 steps are 79 min and $3.69, which its authors rounded to 75 min and $3.50."""
    pace = Pace.of([], "large", workload())
    assert pace.source == "as declared: the original runs, one H100, not measured here"
    one = pace.price(study(), ["muon"], 500)
    assert (one.seconds, one.cost_usd) == (pytest.approx(4750), pytest.approx(3.694, abs=5e-4))
    whole = price_of_study(study(), pace, 500)
    assert whole.text(2.8) == "25 runs, about 33 GPU hours, $92.36"
    most = price_at_n_max(study(), pace, 500)
    assert most is not None
    assert most.text(2.8) == "60 runs, about 79.2 GPU hours, $221.67"
    assert most.cost_usd == pytest.approx(60 * (one.cost_usd or 0))


def test_without_a_pace_the_price_is_unknown_and_without_a_price_it_is_time() -> None:
    none = Pace.of([], "large", workload(pace=False))
    assert none.source == "no run of large is recorded yet"
    assert price_of_study(study(), none, 500).text(2.8) == "25 runs, at an unknown pace"
    free = study(price_usd_per_gpu_hour=0, budget_usd=0)
    assert price_of_study(free, Pace.of([], "large", workload()), 500).text(0) == "25 runs, about 33.0 h of computing"


def test_a_run_on_four_devices_is_the_pace_of_one_that_takes_four_times_as_long() -> None:
    """Four at once are no faster for their money: else one such run would make every plan look four times cheaper."""
    four = Pace.of([run("muon", 2.5, device_count=4)], "large", workload())
    alone = Pace.of([run("muon", 10.0)], "large", workload())
    assert four.price(study(), ["muon"], 500).cost_usd == alone.price(study(), ["muon"], 500).cost_usd


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), st.sampled_from(["muon", "nolah"]))
def test_one_like_run_takes_the_place_of_the_declared_pace(paces: list[float], arm: str) -> None:
    found = Pace.of([run(arm, seconds) for seconds in paces], "large", workload())
    ordered = sorted(paces)
    middle = (ordered[(len(paces) - 1) // 2] + ordered[len(paces) // 2]) / 2
    assert found.seconds(arm, 1) == found.seconds("another", 1) == pytest.approx(middle)
    assert "declared" not in found.source


@pytest.mark.parametrize(
    "unlike",
    [
        run("muon", 1.0, workload="other"),
        run("muon", 1.0, steps=50, batch=4),
        run("muon", 1.0, status="failed", val_loss=None),
        run("muon", 1.0, final_step=0, tokens=0),
    ],
    ids=["workload", "batch", "failed", "no step"],
)
def test_a_run_of_another_kind_tells_no_pace(unlike: RunRecord) -> None:
    assert Pace.of([unlike], "large", workload()).overall == 9.5
    assert Pace.of([unlike, run("muon", 2.0)], "large", workload()).overall == pytest.approx(2.0)


def test_another_devices_pace_serves_where_this_one_has_none_and_is_named() -> None:
    other = run("muon", 3.0, device="an H100")
    assert "on another device than this one (an H100)" in Pace.of([other], "large", workload()).source
    assert Pace.of([other, run("muon", 2.0)], "large", workload()).overall == pytest.approx(2.0)


def test_a_fixed_plan_a_tuning_and_a_rehearsal_have_no_price_at_n_max() -> None:
    pace = Pace.of([], "large", workload())
    fixed = study(decision={"min_effect": "0.5%", "plan": {"fixed": 5}})
    tuning = study(kind="tuning", grid={"lr": [0.1, 0.2, 0.4]}, seeds=[1000, 1001])
    assert price_at_n_max(fixed, pace, 500) is None
    assert price_at_n_max(tuning, pace, 500) is None
    assert price_at_n_max(study(twins={"tiny": {"workload": "tiny"}}).twin("tiny"), pace, 500) is None
    assert price_of_study(tuning, pace, 500).runs == 5 * 2 * 3


# A budget of less than one pair


@given(st.floats(0.01, 50), st.lists(st.floats(0.5, 20), min_size=3, max_size=3))
def test_a_budget_is_too_small_where_it_does_not_pay_the_cheapest_pair(budget: float, paces: list[float]) -> None:
    runs = [run(arm, pace) for arm, pace in zip(("muon", "nolah", "orthonoise"), paces, strict=True)]
    pace = Pace.of(runs, "large", workload())
    why = too_small_a_budget(study(budget_usd=budget), runs, pace, 500)
    pair = 500 * (paces[0] + min(paces[1:])) / 3600 * 2.8
    assert (why is None) == (budget >= pair or budget == pytest.approx(pair))
    # A result of its own: from then on what is left of the budget decides.
    own = run("muon", 1.0, study="001-x")
    assert too_small_a_budget(study(budget_usd=budget), [*runs, own], pace, 500) is None


def test_where_nothing_tells_or_nothing_is_paid_no_budget_is_too_small() -> None:
    unknown = Pace.of([], "large", workload(pace=False))
    assert too_small_a_budget(study(budget_usd=0.01), [], unknown, 500) is None
    free = study(price_usd_per_gpu_hour=0, budget_usd=0)
    assert too_small_a_budget(free, [], Pace.of([], "large", workload()), 500) is None


PROJECT = Path(__file__).parents[2]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The project's declarations, with a study whose budget pays for less than a pair."""
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["workloads"]["large"] = {**params["workloads"]["tiny"], "pace": {"seconds_per_step": 9.5, "source": "they"}}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    folder = tmp_path / "experiments" / "001-x"
    folder.mkdir(parents=True)
    content = study(budget_usd=4).model_dump(mode="json", exclude_defaults=True)
    (folder / "study.yaml").write_text(json.dumps({"study": content}))
    return Layout(root=tmp_path, main=tmp_path)


def test_a_study_that_cannot_pay_one_pair_is_refused_before_its_first_run(layout: Layout) -> None:
    """Tiny's 300 steps at 9.5 s: a pair is 95 min, $4.43 of the 4."""
    with pytest.raises(
        UsageError, match=r"^experiments/001-x/study.yaml: budget_usd is 4, less than one pair .*\$4.43"
    ):
        check(layout, "001-x")
    path = layout.study("001-x") / "study.yaml"
    path.write_text(path.read_text().replace('"budget_usd": 4.0', '"budget_usd": 4.44'))
    params, declared = check(layout, "001-x")
    refuse_small_budget(layout, params, declared)


# Whether a GO can be reached with the budget


def test_a_budget_pays_for_the_seeds_whose_arms_it_pays_all_of() -> None:
    """9.5 s a step over 500 steps: a seed of five arms costs 5 x $3.694 = $18.47."""
    pace = Pace.of([], "large", workload())
    all_runs = [(arm, seed) for arm in study().arms for seed in study().seeds]
    for left, pairs in ((18.4, 0), (18.5, 1), (100, 5), (1000, 12)):
        assert pairs_paid_for(study(), pace, 500, all_runs, left_usd=left) == pairs
    later = [(arm, seed) for arm, seed in all_runs if seed > 1]
    assert pairs_paid_for(study(), pace, 500, later, left_usd=0) == 2
    assert pairs_paid_for(study(), pace, 500, [("muon", 0), *later], left_usd=22.2) == 3  # 3.69 and 18.47
    free = study(price_usd_per_gpu_hour=0, budget_usd=0)
    assert pairs_paid_for(free, pace, 500, all_runs, left_usd=0) is None
    assert pairs_paid_for(study(), Pace.of([], "large", workload(pace=False)), 500, all_runs, left_usd=9) is None


def test_a_go_beyond_the_budget_or_beyond_the_e_value_is_warned_of() -> None:
    """At g = 2 a GO takes 4 pairs at alpha 0.05 and at 0.05 / 2, 5 at 0.05 / 3 and 6 at 0.05 / 20."""
    two = study()
    first = max(4, first_attainable_n(0.05 / 2, 2.0))
    assert list(go_notes(two, first, amended=False)) == list(go_notes(two, None, amended=False)) == []
    (said,) = go_notes(two, first - 1, amended=False)
    assert f"the budget pays for {first - 1} pairs; the earliest possible GO is at {first} pairs: no GO" in said
    fixed = study(decision={"min_effect": "0.5%", "plan": {"fixed": 5}})
    (said,) = go_notes(fixed, 4, amended=False)
    assert "pays for 4 pairs; the earliest possible GO is at 5 pairs" in said
    many = study(
        challengers=[f"c{i}" for i in range(20)], control=[], reference=[], decision={"min_effect": "0.5%", "n_max": 5}
    )
    late = first_attainable_n(0.05 / 20, 2.0)
    assert late > 5
    (said,) = go_notes(many, None, amended=False)
    assert f"the earliest possible GO is at {late} pairs, and the plan ends at 5: only its last look can" in said
    (said,) = go_notes(many, None, amended=True)
    assert "no GO is possible, since the plan is amended" in said
    assert len(list(go_notes(many, 4, amended=False))) == 2
    assert list(go_notes(study(twins={"t": {"workload": "tiny"}}).twin("t"), None, amended=False)) == []


# Batch and examples by run length


@pytest.mark.parametrize(
    ("steps", "batch", "examples"),
    [(1, 4, 1000), (50, 4, 1000), (51, 8, 10000), (500, 8, 10000), (501, 16, 100000), (5000, 16, 100000)],
)
def test_batch_and_examples_follow_the_number_of_steps(steps: int, batch: int, examples: int) -> None:
    settings = workload(steps, eval_every=1).settings
    assert (settings.batch_size, settings.examples) == (batch, examples)
    assert by_run_length(settings) == ["batch_size", "examples"]
    assert size_text(settings) == (
        f"{steps} steps of {batch} x 512 tokens, on {examples:,} examples (batch and examples by run length)"
    )


def test_what_a_workload_says_itself_is_not_called_by_run_length() -> None:
    own = workload(500, batch_size=3).settings
    assert by_run_length(own) == ["examples"]
    assert size_text(own) == "500 steps of 3 x 512 tokens, on 10,000 examples (examples by run length)"
    assert size_text(WorkloadSettings(steps=300)) == "300 steps of 4 x 128 tokens, on all examples"


# What was spent by attempts that were killed


def test_a_killed_attempt_is_paid_for_before_and_after_its_record_is_written(tmp_path: Path) -> None:
    layout = Layout(root=tmp_path, main=tmp_path)
    scratch = CellScratch(layout, "0" * 64)
    folder = scratch.folder / "attempts" / "1"
    folder.mkdir(parents=True)
    kept = {"study", "workload", "arm", "seed", "cell_digest", "registration", "attempt", "attempt_id", "started_at",
            "device_count", "hashes", "provenance"}  # fmt: skip
    started = {key: value for key, value in record("muon", 0, 4.0).model_dump().items() if key in kept}
    purpose = {"study": "001-x", "registration": None, "price_usd_per_gpu_hour": 2.8}
    (folder / "start.json").write_text(json.dumps({"record": started, "purpose": purpose}))
    (folder / "progress.json").write_text(
        json.dumps({"step": 90, "steps": 300, "loss": 5.0, "seconds": 900.0, "tokens": 1, "resumed_from_step": 0})
    )
    with FileLock(scratch.folder / "lock"):
        assert ended_attempts(layout) == []  # it may be training
    before = ended_attempts(layout)
    assert [(r.status, r.cost_usd) for r in before] == [("abandoned", pytest.approx(0.7))]
    assert not (folder / "record.json").exists()
    scratch.sweep_unless_held()
    assert (folder / "record.json").exists()
    assert ended_attempts(layout) == before
