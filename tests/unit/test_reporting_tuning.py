"""What a tuning study's report says: laws of the choice, and that nothing flattering goes unsaid."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reporting_studies import BASELINE, NOLAH, made_up

from muonlab.registry.errors import UsageError
from muonlab.registry.settings import WorkloadSettings
from muonlab.registry.snapshot import ArmTuning
from muonlab.registry.study import Study
from muonlab.reporting.blocks import Table
from muonlab.reporting.document import build
from muonlab.reporting.figures.tuning import swept, tuning
from muonlab.reporting.index import IndexEntry, render_index
from muonlab.reporting.report import markdown_table
from muonlab.reporting.tuning_report import outcome, read_tuned, tuning_document, warnings, write_tuning_report
from muonlab.reporting.tuning_standing import ArmResult, GridRun, Options, TuningStanding, judge_arm
from muonlab.reporting.tuning_wording import tuning_limits, tuning_sentences

SETTINGS = WorkloadSettings(steps=300)
GRID = {"lr": [0.005, 0.01, 0.02]}
Outcome = float | str | None
"""A final loss, `diverged`, `failed`, or None for a run that is missing."""


def declared(arms: Sequence[str], grid: Mapping[str, list[object]], seeds: Sequence[int], **changes: object) -> Study:
    return Study.model_validate(
        {
            "slug": "900-tune", "question": "Which learning rate?", "kind": "tuning", "workload": "tiny",
            "baseline": arms[0], "challengers": list(arms[1:]), "seeds": list(seeds), "grid": grid,
            "price_usd_per_gpu_hour": 0, "budget_usd": 0, **changes,
        }
    )  # fmt: skip


def standing(
    outcomes: Mapping[str, Sequence[Sequence[Outcome]]],
    *,
    grid: Mapping[str, list[object]] = GRID,
    allowed: Callable[[Options], bool] = lambda options: True,
    **changes: object,
) -> TuningStanding:
    """A standing from, for every arm, the outcomes of each grid point seed by seed."""
    study_changes = {name: changes.pop(name) for name in ("twin_of", "price_usd_per_gpu_hour") if name in changes}
    if "price_usd_per_gpu_hour" in study_changes:
        study_changes["budget_usd"] = 100
    count = len(next(iter(outcomes.values()))[0])
    study = declared(list(outcomes), grid, range(1000, 1000 + count), **study_changes)
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = [
        run_of(arm, point, seed, outcomes[arm][p][s])
        for s, seed in enumerate(study.seeds)
        for arm in study.arms
        for p, point in enumerate(points)
    ]
    complete = all(run.has_outcome for run in runs)
    arms = [
        judge_arm(
            study, arm, [r for r in runs if r.arm == arm], diverged_loss=SETTINGS.diverged_loss, complete=complete,
            allowed=allowed,
        )
        for arm in study.arms
    ]  # fmt: skip
    fields = {
        "study": study, "settings": SETTINGS, "source": "ledger", "made_under": "", "runs": runs, "arms": arms,
        "in_params": {result.arm: "committed" for result in arms if result.choice}, "used_by": ["001-one"],
        "registration": None, "registered_at": None, "made_on": [], "findings": [], "notes": [],
        "total_seconds": 60.0, "total_cost_usd": 0.5, "lost_seconds": 0.0, "lost_cost_usd": 0.0,
    }  # fmt: skip
    return TuningStanding.model_validate({**fields, **changes})


def run_of(arm: str, options: Options, seed: int, outcome: Outcome) -> GridRun:
    state = "missing" if outcome is None else outcome if isinstance(outcome, str) else "completed"
    return GridRun(
        arm=arm, options=options, seed=seed, digest="d", state=state,  # type: ignore[arg-type]
        val_loss=None if outcome is None or isinstance(outcome, str) else outcome,
        attempts=0 if outcome is None else 1, wall_seconds=5.0, cost_usd=0.0,
        error="OutOfMemory" if outcome == "failed" else None,
    )  # fmt: skip


def judged(points: Sequence[Sequence[Outcome]], **changes: object) -> ArmResult:
    return standing({"muon": points}, **changes).arms[0]  # type: ignore[arg-type]


LOSS = st.one_of(st.floats(1.0, 9.0), st.just("diverged"))
TABLE = st.lists(st.lists(LOSS, min_size=2, max_size=2), min_size=3, max_size=3)


@given(TABLE)
def test_the_choice_has_the_lowest_mean_and_a_divergence_counts_as_uniform_guessing(table: list[list[Outcome]]) -> None:
    found = judged(table)
    counted = [[math.log(2048) if loss == "diverged" else loss for loss in row] for row in table]
    means = [math.fsum(row) / 2 for row in counted]  # type: ignore[arg-type]
    if found.chosen is None:
        assert table[means.index(min(means))] == ["diverged", "diverged"]
    else:
        assert means[found.chosen] == min(means)
    assert [point.mean for point in found.points] == pytest.approx(means)


@given(TABLE, st.floats(-0.5, 0.5), st.permutations([0, 1]))
def test_neither_the_order_of_the_seeds_nor_their_difficulty_decides(
    table: list[list[Outcome]], shift: float, order: list[int]
) -> None:
    finite = [[4.0 if loss == "diverged" else round(loss, 3) for loss in row] for row in table]  # type: ignore[arg-type]
    shifted = [[row[i] + (shift if i else 0.0) for i in order] for row in finite]
    first, second = judged(finite), judged(shifted)
    chosen = second.choice
    assert chosen is not None
    assert chosen.mean is not None
    assert first.points[second.chosen or 0].mean == pytest.approx(chosen.mean - shift / 2)
    if first.chosen == second.chosen:
        near = [sorted(close.options["lr"] for close in found.close if abs(close.gap - close.spread) > 1e-6)
                for found in (first, second)]  # fmt: skip
        assert near[0] == near[1]


def test_an_arm_without_a_point_that_trains_gets_nothing_and_the_others_theirs() -> None:
    found = standing({"muon": [["diverged"] * 2] * 3, "nolah": [[5.0, 5.1], [4.0, 4.1], [6.0, 6.1]]})
    assert [result.chosen for result in found.arms] == [None, 1]
    assert "nothing for muon" in outcome(found)
    assert found.arms[0].why_none == "its best point diverged on every seed"


@pytest.mark.parametrize("gone", ["failed", "abandoned", None])
def test_nothing_is_chosen_for_any_arm_before_every_run_has_an_outcome(gone: Outcome) -> None:
    found = standing({"muon": [[5.0, 5.1], [4.0, 4.1], [6.0, 6.1]], "nolah": [[5.0, 5.1], [4.0, gone], [6.0, 6.1]]})
    assert [result.chosen for result in found.arms] == [None, None]
    said = " ".join(warnings(found))
    assert "11 of 12 declared runs have an outcome" in said
    assert "Unequal numbers of runs have an outcome: muon 6 and nolah 5." in said
    assert outcome(found).startswith("Nothing is chosen yet")


@pytest.mark.parametrize(
    ("values", "best", "side", "step"),
    [
        ([0.005, 0.01, 0.02], 2, "largest", 0.04),
        ([0.005, 0.01, 0.02], 0, "smallest", 0.0025),
        ([0.02, 0.005, 0.01], 0, "largest", 0.04),  # the order of the declaration is not the order of the numbers
        ([0.02, 0.005, 0.01], 2, None, None),
        ([0, 10, 20], 2, "largest", 40),
        ([4, 5], 0, "smallest", 3),
        ([0.01], 0, None, None),
        (["svd", "gram_eigh", "auto"], 0, None, None),
        ([True, False], 1, None, None),
    ],
)
def test_the_edge_is_that_of_the_numbers_and_says_which_way_to_go(
    values: list[object], best: int, side: str | None, step: float | None
) -> None:
    found = judged([[4.0 if i == best else 5.0] * 2 for i in range(len(values))], grid={"lr": values})
    assert [(edge.side, edge.next_value) for edge in found.edges] == ([] if side is None else [(side, step)])


def test_a_grid_that_ends_where_the_option_ends_has_no_edge_there() -> None:
    def allowed(options: Options) -> bool:
        return 0 <= options["momentum"] < 1

    table = [[4.0] * 2, [5.0] * 2]
    assert judged(table, grid={"momentum": [0.0, 0.9]}, allowed=allowed).edges == []
    (edge,) = judged(table[::-1], grid={"momentum": [0.9, 0.95]}, allowed=allowed).edges
    assert (edge.side, edge.next_value) == ("largest", None)  # one more step of this grid is not allowed, 0.97 is


def test_a_choice_that_the_seeds_do_not_tell_apart_is_called_a_coin_toss() -> None:
    close = judged([[5.0, 5.1], [4.00, 4.10], [4.05, 4.06]])
    assert [(c.options, round(c.gap, 6), round(c.spread, 6)) for c in close.close] == [
        ({"lr": 0.02}, 0.005, round(0.045 * math.sqrt(2), 6))
    ]
    assert judged([[5.0, 5.1], [4.00, 4.10], [4.05, 4.15]]).close == []  # worse by as much on every seed
    assert [c.gap for c in judged([[5.0, 5.1], [4.0, 4.1], [4.0, 4.1]]).close] == [0.0]
    assert judged([[5.0], [4.0], [4.0001]]).close == []  # one seed has no spread


def text_of(found: TuningStanding) -> str:
    document = tuning_document(found, drawn=False)
    parts = [document.headline, *document.lead, *document.warnings]
    for section in document.sections:
        for block in section.blocks:
            parts.append(markdown_table(block) if isinstance(block, Table) else str(block))
    return "\n".join(parts)


def test_the_report_shows_every_seed_marks_the_choice_and_names_what_diverged() -> None:
    found = standing(
        {"muon": [[5.0, 5.1], [4.0, 4.1], ["diverged", 6.1]], "nolah": [[5.2, 5.3], [4.2, 4.3], [7.0, 7.1]]}
    )
    said = text_of(found)
    for loss in ("5.0000", "5.1000", "4.1000", "6.1000", "7.1000"):
        assert loss in said
    assert "**4.0500**" in said
    assert "| muon  |       0.02 | 6.8623 (1 diverged) |  diverged |    6.1000 |".replace(" ", "") in said.replace(
        " ", ""
    )
    assert "Chosen: lr 0.01 for muon and nolah." in said
    assert not warnings(found)


def test_the_report_warns_at_the_edge_of_a_coin_toss_and_of_a_choice_that_diverged() -> None:
    edge = standing({"muon": [[5.0, 5.1], [4.5, 4.6], [4.0, 4.1]]})
    assert "At the edge of the grid" in text_of(edge)
    assert "lr 0.02 is the largest that was tried: try larger ones, such as 0.04" in text_of(edge)
    assert "extend the grid" in text_of(edge)
    toss = standing({"muon": [[4.2, 3.9], [4.0, 4.0], [6.0, 6.1]]})
    assert "A coin toss" in text_of(toss)
    assert "muon: lr 0.01 or lr 0.005 (0.050 against a spread of 0.21 nats/token)" in text_of(toss)
    assert "closer to another than the seeds can tell" in outcome(toss)
    wild = standing({"muon": [["diverged", "diverged"], ["diverged", 4.0], ["diverged", "diverged"]]})
    assert "muon diverged at the chosen lr 0.01 with the seed 1000" in text_of(wild)
    assert "One seed" in text_of(standing({"muon": [[5.0], [4.0], [6.0]]}))


def test_where_the_numbers_are_from_and_who_rehearses_stands_above_all() -> None:
    table = {"muon": [[5.0, 5.1], [4.0, 4.1], [6.0, 6.1]]}
    copied = standing(table, source="results.csv", made_under="they were made under other code than today's")
    assert warnings(copied) == [
        "From experiments/900-tune/results.csv, since the ledger has none of these runs; they were made under other "
        "code than today's."
    ]
    assert "says nothing about that study" in " ".join(warnings(standing(table, twin_of="901-tune")))
    assert outcome(standing(table, findings=["a line was edited"])).startswith("Contradiction")
    assert "$0.50" in text_of(standing(table, price_usd_per_gpu_hour=2.8))


def test_several_options_are_chosen_together() -> None:
    grid: dict[str, list[object]] = {"lr": [0.01, 0.02], "momentum": [0.9, 0.95]}
    found = standing({"muon": [[5.0, 5.1], [4.0, 4.1], [4.8, 4.9], [6.0, 6.1]]}, grid=grid)
    assert found.arms[0].choice is not None
    assert found.arms[0].choice.options == {"lr": 0.01, "momentum": 0.95}
    assert {edge.option for edge in found.arms[0].edges} == {"lr", "momentum"}
    assert "lr 0.01, momentum 0.95 for muon" in outcome(found)
    assert swept(found) == "lr"


MANY: dict[str, list[object]] = {
    "lr": [0.01, 0.02],
    "momentum": [0.9, 0.95, 0.99],
    "weight_decay": [0.0, 0.1, 0.2, 0.3],
}


@pytest.mark.parametrize(
    ("grid", "points"), [(GRID, 3), ({"momentum": [0.9]}, 1), ({"nesterov": [True, False]}, 2), (MANY, 24)]
)
def test_the_figure_is_drawn_for_any_grid_and_is_the_same_again(grid: dict[str, list[object]], points: int) -> None:
    table = [[4.0 + 0.1 * i, 4.1 + 0.1 * i] for i in range(points - 1)] + [["diverged", 60.0]]
    found = (
        standing({"muon": table, "nolah": table}, grid=grid)
        if points > 1
        else standing({"muon": [[4.0, 4.1]]}, grid=grid)
    )
    for narrow in (False, True):
        drawn = tuning(found, narrow=narrow)
        assert drawn is not None
        assert drawn == tuning(found, narrow=narrow)
    assert tuning(standing({"muon": [["diverged"] * 2] * 3})) is None


def test_what_is_written_is_read_by_the_index(tmp_path: Path) -> None:
    out = tmp_path / "900-tune"
    out.mkdir()
    found = standing({"muon": [[5.0, 5.1], [4.0, 4.1], [6.0, 6.1]]})
    write_tuning_report(found, out)
    tuned = read_tuned(out)
    assert tuned is not None
    assert tuned.chosen == {"muon": {"lr": 0.01}}
    assert TuningStanding.model_validate(
        {k: v for k, v in json.loads((out / "tuning.json").read_text()).items() if k in TuningStanding.model_fields}
    ) == found  # fmt: skip
    text = render_index([IndexEntry("900-tune", tuned.question, "tuning", tuned=tuned)])
    assert "- [900-tune](900-tune/report.md): Chosen: lr 0.01 for muon." in text
    assert "figures/tuning.svg" in (out / "report.md").read_text()
    assert '<td class="number strong">4.0500</td>' in (out / "report.html").read_text()
    for content in (
        "",
        "[]",
        json.dumps({"slug": "other", "outcome": "x", "question": "", "chosen": {}, "twin_of": None}),
    ):
        (out / "tuning.json").write_text(content)
        with pytest.raises(UsageError, match="`muon report 900-tune` makes it anew"):
            read_tuned(out)
    assert read_tuned(tmp_path / "none") is None


def tuned(**changes: object) -> ArmTuning:
    fields = {
        "study": "900-tune",
        "runs": 10,
        "seeds": [1000, 1001],
        "tried": {"lr": [0.0025, 0.005, 0.01, 0.02, 0.04]},
    }
    return ArmTuning.model_validate({**fields, "chosen": {"lr": 0.01}, "in_use": True, **changes})


def test_a_comparison_prints_the_tuning_of_every_arm() -> None:
    arms = {
        "a": tuned(),
        "b": tuned(in_use=False),
        "c": tuned(at_edge=["lr"]),
        "d": tuned(chosen={}, in_use=False, runs=7),
        "e": tuned(tried={"lr": [0.01], "momentum": [0.9, 0.95]}, chosen={"lr": 0.01, "momentum": 0.9}, runs=4),
    }
    options = {arm: {"lr": 0.02} for arm in [*arms, "f"]}
    made = "10 runs (5 learning rates x 2 seeds)"
    assert tuning_sentences("900-tune", [*arms, "f"], arms, options) == [
        f"a: {made} by 900-tune, lr 0.01 chosen and used.",
        f"b: untuned as it runs here, {made} by 900-tune chose lr 0.01 and it has lr 0.02.",
        f"c: {made} by 900-tune, lr 0.01 chosen and used, at the edge of what was tried for lr.",
        f"d: untuned, {made.replace('10', '7')} by 900-tune and nothing chosen.",
        "e: 4 runs (1 learning rate x 2 values of momentum x 2 seeds) by 900-tune, lr 0.01, momentum 0.9 chosen and "
        "used.",
        "f: untuned, 900-tune has no run of it.",
    ]


def test_the_limits_of_a_comparison_name_unequal_and_missing_tuning() -> None:
    def limits(**tunings: ArmTuning) -> str:
        snapshot = made_up({"muon": BASELINE, "nolah": NOLAH}).snapshot
        return " ".join(tuning_limits(snapshot.model_copy(update={"tuning": tunings})))

    fair = limits(muon=tuned(), nolah=tuned())
    assert fair.startswith("Tuning: the learning rates are those of the tuning study 900-tune;")
    assert "Un" not in fair
    unequal = limits(muon=tuned(), nolah=tuned(runs=4))
    assert "Unequal tuning: muon 10 runs and nolah 4 runs" in unequal
    half = limits(muon=tuned())
    assert "Untuned: nolah runs with values that 900-tune did not choose" in half
    assert "muon 10 runs and nolah 0 runs" in half
    assert "Untuned: nolah runs" in limits(muon=tuned(), nolah=tuned(in_use=False))
    assert "Tuning:" not in limits()
    assert "Edge of the grid: the values of nolah" in limits(muon=tuned(), nolah=tuned(at_edge=["lr"]))


def test_the_section_on_tuning_is_there_where_a_tuning_study_is_named() -> None:
    for named in ("900-tune", "untuned"):
        document = build(made_up({"muon": BASELINE, "nolah": NOLAH}, tuning=named), pictures=())
        titles = [section.title for section in document.sections]
        assert ("Tuning" in titles) == (named != "untuned")
