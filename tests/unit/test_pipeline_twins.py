"""Twins are derived, never declared twice, and decide nothing; a selection is confirmed on seeds that did not pick."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, TRIVIAL, Outcome, made_up, record, shifted

from muonlab.pipeline import selection
from muonlab.pipeline.conclude import index_entries
from muonlab.pipeline.declare import register
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.parts import chosen_cells
from muonlab.pipeline.resolve import check_study, load_params, load_study, resolve_optimizer
from muonlab.pipeline.selecting import with_challenger
from muonlab.pipeline.study_run import obstacles
from muonlab.pipeline.twins import twin_slug
from muonlab.registry import ledger
from muonlab.registry.errors import UsageError
from muonlab.registry.snapshot import Selection
from muonlab.registry.study import Study
from muonlab.reporting.document import build
from muonlab.reporting.selected import selection_doubts, selection_notes
from muonlab.reporting.standing import Standing, judge
from muonlab.reporting.wording import decision_sentence, headline, next_step

PROJECT = Path(__file__).parents[2]
DECLARED: dict[str, Any] = {
    "slug": "010-x",
    "question": "Does it?",
    "workload": "big",
    "baseline": "muon",
    "challengers": ["nolah", "orthonoise"],
    "control": ["isotropic"],
    "seeds": [0, 1, 2, 3],
    "decision": {"min_effect": "0.5%"},
    "price_usd_per_gpu_hour": 2.8,
    "budget_usd": 50,
    "on_archive": "orthonoise",
    "twins": {"tiny": {"workload": "tiny", "seeds": 2}},
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(root=tmp_path, main=tmp_path)


def declare(layout: Layout, slug: str = "010-x", **changes: object) -> None:
    folder = layout.study(slug)
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(json.dumps({"study": {**DECLARED, "slug": slug, **changes}}))


def refusal(layout: Layout, slug: str) -> str:
    with pytest.raises(UsageError) as refused:
        load_study(layout, slug)
    return str(refused.value)


def test_a_twin_has_its_studys_arms_and_rule_and_nothing_to_pay_or_to_wait_for(layout: Layout) -> None:
    declare(layout, requires=[])
    parent, twin = load_study(layout, "010-x"), load_study(layout, "010-x-tiny")
    changed = {name for name in Study.model_fields if getattr(twin, name) != getattr(parent, name)}
    assert changed == {
        "slug", "workload", "seeds", "price_usd_per_gpu_hour", "budget_usd", "on_archive", "twins", "twin_of"
    }  # fmt: skip
    assert (twin.twin_of, twin.workload, twin.seeds, twin.budget_usd) == ("010-x", "tiny", [0, 1], 0)
    assert twin_slug(parent, "tiny") == twin.slug
    assert twin.registration({}) != parent.registration({})


def test_a_twin_of_a_fixed_plan_is_whole_when_it_is_read_back(layout: Layout) -> None:
    """A rehearsal has fewer seeds than the plan looks at; no other study may."""
    fixed = {"min_effect": "0.5%", "plan": {"fixed": 4}}
    declare(layout, decision=fixed)
    twin = load_study(layout, "010-x-tiny")
    assert Study.model_validate_json(twin.model_dump_json()) == twin
    with pytest.raises(ValueError, match="2 seeds do not match plan fixed: 4"):
        Study.model_validate({**DECLARED, "seeds": [0, 1], "decision": fixed})


def test_a_short_twin_of_a_fixed_plan_is_judged_on_the_pairs_it_has() -> None:
    """Its study looks once, at five pairs, and is INCOMPLETE before; a rehearsal never gets there."""
    plan = {"plan": {"fixed": 5}}
    three: dict[str, list[Outcome]] = {"muon": list(BASELINE[:3]), "good": STRONG[:3]}
    assert "INCONCLUSIVE on good" in headline(made_up(three, decision=plan, twin_of="010-x"))
    five: dict[str, list[Outcome]] = {"muon": list(BASELINE), "good": STRONG}
    assert "GO on good" in headline(made_up(five, decision=plan, twin_of="010-x"))


@pytest.mark.parametrize(
    ("slug", "says"),
    [
        ("010-x-tinny", "no twin of 010-x: its twins are tiny (--workload NAME). Did you mean '010-x-tiny'?"),
        ("011-y-tiny", "unknown study '011-y-tiny'; allowed: 010-x."),
        ("010-xtiny", "unknown study '010-xtiny'. Did you mean '010-x'? Allowed: 010-x."),
    ],
)
def test_a_twin_without_a_parent_and_a_parent_without_the_twin(layout: Layout, slug: str, says: str) -> None:
    declare(layout)
    layout.study(slug).mkdir()
    (layout.study(slug) / "registration.json").write_text("{}")
    assert says in refusal(layout, slug)


def test_a_study_without_twins_says_what_it_runs_on(layout: Layout) -> None:
    declare(layout, workload="tiny", twins={})
    with pytest.raises(UsageError, match="--workload tiny: 010-x declares no rehearsal and runs on the workload tiny"):
        twin_slug(load_study(layout, "010-x"), "tiny")


def test_an_arm_without_a_learning_rate_or_a_name_is_told_the_ways_on(layout: Layout) -> None:
    (layout.root / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    params = load_params(layout.params)
    with pytest.raises(UsageError, match="on 'tiny'; `muon study new SLUG --kind tuning --challenger muon-svd"):
        resolve_optimizer(params, "tiny", "muon-svd")
    with pytest.raises(UsageError, match="A new one is named under `optimizers:` in params"):
        resolve_optimizer(params, "tiny", "mine")


def test_a_twin_is_not_declared_in_a_file(layout: Layout) -> None:
    declare(layout, twins={}, twin_of="009-w")
    assert "twin_of is '009-w'; a twin has no file of its own" in refusal(layout, "010-x")


@pytest.mark.parametrize(
    ("twin", "says"),
    [
        ({"workload": "big", "seeds": 2}, ".workload: big is the workload of 010-x itself"),
        ({"workload": "paid", "seeds": 2}, ".workload: 011-y pays for its runs on paid"),
        ({"workload": "tiny", "seeds": 5}, ".seeds: found 5, and 010-x declares 4"),
        ({"workload": "tiny", "seeds": 2, "grid": {"lr": [1]}}, ".grid: 010-x is a comparison, which tries no grid"),
    ],
)
def test_a_rehearsal_is_no_look_at_real_runs(layout: Layout, twin: dict[str, Any], says: str) -> None:
    declare(layout, twins={"small": twin})
    declare(layout, "011-y", workload="paid", twins={})
    declare(layout, "012-z", workload="tiny", price_usd_per_gpu_hour=0, twins={})
    for slug in ("010-x", "010-x-small"):
        said = refusal(layout, slug)
        assert said.startswith(f"experiments/010-x/study.yaml: study.twins.small{says}")
        assert "\n" not in said


def test_a_twin_of_a_tuning_study_tries_other_values_of_its_options_only(layout: Layout) -> None:
    tuning = {"kind": "tuning", "decision": None, "grid": {"lr": [1, 2]}}
    declare(layout, twins={"small": {"workload": "tiny", "seeds": 2, "grid": {"lr": [3]}}}, **tuning)
    assert load_study(layout, "010-x-small").grid == {"lr": [3]}
    declare(layout, "011-y", twins={"small": {"workload": "tiny", "seeds": 2, "grid": {"momentum": [0.9]}}}, **tuning)
    assert "study.twins.small.grid: unknown option 'momentum'; allowed: lr" in refusal(layout, "011-y")


def test_reported_results_are_not_rehearsed(layout: Layout) -> None:
    known = {"model": "m", "data": "d", "steps": 9, "eval_every": 3}
    reported = {"source": "a paper", "workloads": {"big": known}}
    declare(layout, provenance="reported", reported=reported, seeds=[0])
    assert "there is nothing to rehearse" in refusal(layout, "010-x")


def test_a_study_with_the_slug_of_a_twin_is_refused_and_so_is_its_namesake(layout: Layout) -> None:
    declare(layout)
    declare(layout, "010-x-tiny", twins={})
    for slug in ("010-x", "010-x-tiny"):
        said = refusal(layout, slug)
        assert said.startswith("experiments/010-x-tiny/study.yaml: the twin 'tiny' of 010-x has the same slug")


def test_two_twins_of_one_slug_are_refused(layout: Layout) -> None:
    declare(layout, "010", twins={"x-tiny": {"workload": "tiny"}})
    declare(layout)
    assert "stands for two twins, 'x-tiny' of 010 and 'tiny' of 010-x" in refusal(layout, "010-x-tiny")


def test_a_study_with_a_wrong_twin_is_refused_as_a_whole() -> None:
    params = load_params(PROJECT / "params.yaml")
    declared = {**DECLARED, "workload": "tiny", "control": [], "on_archive": None}
    study = Study.model_validate({**declared, "twins": {"small": {"workload": "tinny"}}})
    with pytest.raises(UsageError, match=r"010-x/study\.yaml: study\.twins\.small\.workload: unknown workload 'tinny'"):
        check_study(params, study)
    untuned = copy.deepcopy(params.model_dump())
    del untuned["workloads"]["tiny-100"]["tuned"]["nolah"]
    study = Study.model_validate({**declared, "twins": {"small": {"workload": "tiny-100"}}})
    check_study(params, study)
    with pytest.raises(UsageError, match="'nolah' has no learning rate on 'tiny-100'"):
        check_study(type(params).model_validate(untuned), study)


def test_every_declared_twin_can_be_run() -> None:
    layout, params = Layout.find(PROJECT), load_params(PROJECT / "params.yaml")
    for path in sorted(PROJECT.glob("experiments/*/study.yaml")):
        study = load_study(layout, path.parent.name)
        for name in study.twins:
            check_study(params, load_study(layout, twin_slug(study, name)))


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (STRONG, "GO"),
        (NOLAH, "NO_GO"),
        (TRIVIAL, "EQUIVALENT"),
        (NOISY, "INCONCLUSIVE"),
        ([*STRONG[:4], "diverged"], "INCONCLUSIVE"),
        ([*NOLAH[:4], None], "INCOMPLETE"),
    ],
)
def test_whatever_a_rehearsal_comes_to_nothing_is_decided(outcomes: list[Outcome], verdict: str) -> None:
    arms = {"muon": list(BASELINE), "arm": outcomes}
    own, twin = made_up(arms, on_archive="muon"), made_up(arms, on_archive="muon", twin_of="010-x")
    assert [c.decision for c in twin.decided] == [c.decision for c in own.decided]
    assert headline(twin) == f"Rehearsal of 010-x, no decision: {verdict} on arm."
    for said in (headline(twin), decision_sentence(twin), next_step(twin)):
        assert not [word for word in ("archive", "adopt", "keep", "pivot", "add seeds") if word in said.lower()]
    page = build(twin, pictures=())
    assert "decides nothing about 010-x" in page.warnings[0]
    (table,) = [b for s in page.sections if s.title == "Comparisons" for b in s.blocks if hasattr(b, "rows")][:1]
    assert table.rows[0][1].startswith(verdict)
    assert table.rows[0][1].endswith(", rehearsal")
    assert "decides nothing about 010-x" in build(twin, pictures=(), partial=True).warnings[0]


def test_runs_that_other_rehearsals_share_leave_no_pair_out() -> None:
    """Another twin on the same workload may have more seeds: a rehearsal has as many as its study gives it."""
    arms: dict[str, list[Outcome]] = {"muon": list(BASELINE), "arm": STRONG}
    whole = made_up(arms).snapshot
    study = whole.study.model_copy(update={"slug": "012-z", "seeds": [0, 1, 2, 3]})
    left = [
        {"arm": c.arm, "seed": c.seed, "digest": c.digest, "study": "001-made-up"} for c in whole.cells if c.seed == 4
    ]
    cells = [cell for cell in whole.cells if cell.seed < 4]
    content = whole.model_copy(update={"study": study, "cells": cells}).model_dump(mode="json")

    def verdict(twin_of: str | None) -> str:
        changed = {**content, "study": {**content["study"], "twin_of": twin_of}, "left_out": left}
        (found,) = judge(type(whole).model_validate(changed), []).decided
        assert found.decision is not None
        return found.decision.verdict.value

    assert verdict(None) == "INCOMPLETE"
    assert verdict("010-x") not in ("INCOMPLETE", "INVALID")


def test_the_index_knows_a_declaration_and_not_its_twin(layout: Layout) -> None:
    declare(layout)
    assert [(entry.slug, entry.state) for entry in index_entries(layout)] == [("010-x", "waiting")]


def test_a_part_run_chooses_by_name(layout: Layout) -> None:
    declare(layout)
    study = load_study(layout, "010-x-tiny")
    assert chosen_cells(study, ()) == [f"{arm}-{seed}" for seed in (0, 1) for arm in study.arms]
    assert chosen_cells(study, ("muon-*", "*-1")) == ["muon-0", "muon-1", "nolah-1", "orthonoise-1", "isotropic-1"]
    with pytest.raises(UsageError, match="'nolah-2' matches no cell of 010-x-tiny"):
        chosen_cells(study, ("muon-0", "nolah-2"))
    tuning = Study.model_validate({**DECLARED, "kind": "tuning", "grid": {"lr": [1, 2]}, "decision": None})
    with pytest.raises(UsageError, match="a tuning study"):
        chosen_cells(tuning, ("muon-0",))


def confirm(layout: Layout, **changes: object) -> None:
    kept = {"selected_from": "010-x", "challengers": ["nolah"], "seeds": [20, 21], "first_seed": 20, "twins": {}}
    declare(layout, "011-y", **{**kept, **changes})


def test_a_selection_is_confirmed_on_seeds_that_did_not_pick(layout: Layout) -> None:
    """010-x has four seeds and may come to twelve; on another workload its seeds mean other runs."""
    declare(layout)
    confirm(layout)
    assert load_study(layout, "011-y").selected_from == "010-x"
    for first, fits in ((0, False), (11, False), (12, True)):
        content = {**DECLARED, "slug": "011-y", "selected_from": "010-x", "challengers": ["nolah"], "twins": {}}
        study = Study.model_validate({**content, "first_seed": first, "seeds": [first, first + 1]})
        assert study.possible_seeds[0] == first
        declared = ["010-x", "011-y"]
        read = {"010-x": load_study(layout, "010-x"), "011-y": study}.__getitem__
        if fits:
            selection.refuse_unfit(study, declared, read)
        else:
            with pytest.raises(UsageError, match=f"seed {first}, .* such as those from 12 on"):
                selection.refuse_unfit(study, declared, read)
        elsewhere = study.model_copy(update={"workload": "another"})
        selection.refuse_unfit(elsewhere, declared, read)


def test_neither_did_the_seeds_of_what_selected_before(layout: Layout) -> None:
    declare(layout)
    confirm(layout)
    declare(
        layout, "012-z", selected_from="011-y", challengers=["nolah"], seeds=[2, 3], first_seed=2, twins={}, control=[]
    )
    assert "the plan can come to the seed 2, and so can that of 010-x" in refusal(layout, "012-z")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"selected_from": "010-z"},
            "study.selected_from: unknown study '010-z'. Did you mean '010-x'? Allowed: 010-x, 011-y.",
        ),
        ({"selected_from": "011-y"}, "a circle, 011-y <- 011-y"),
        ({"challengers": ["nolha"]}, "the challenger 'nolha' is no arm of 010-x"),
        ({"challengers": ["nolha"]}, "`muon study select 011-y` writes the one that they pick. Did you mean 'nolah'?"),
        ({"baseline": "adamw", "challengers": ["muon"]}, "the challenger 'muon' is no arm of 010-x"),
    ],
)
def test_what_cannot_have_been_selected_is_refused(layout: Layout, changes: dict[str, object], says: str) -> None:
    declare(layout)
    confirm(layout, **changes)
    assert says in refusal(layout, "011-y")


def test_a_tuning_study_selects_no_challenger(layout: Layout) -> None:
    declare(layout, kind="tuning", grid={"lr": [1, 2]}, decision=None, twins={})
    confirm(layout)
    assert "010-x is a tuning study; only a comparison selects" in refusal(layout, "011-y")


def test_the_pick_is_the_lowest_mean_of_the_challengers_alone() -> None:
    better = shifted([0.2] * 5)
    arms = {"muon": list(BASELINE), "nolah": NOLAH, "good": STRONG, "control": better}
    means = selection.mean_losses(made_up(arms, control=["control"]))
    assert means is not None
    assert list(means) == ["nolah", "good"]
    assert means["good"] == pytest.approx(sum(x for x in STRONG if isinstance(x, float)) / 5)
    assert selection.pick(means) == "good"
    diverged = selection.mean_losses(made_up({**arms, "good": [*STRONG[:4], "diverged"]}, control=["control"]))
    assert diverged is not None
    assert selection.pick(diverged) == "nolah"


@pytest.mark.parametrize(
    "standing",
    [
        made_up({"muon": list(BASELINE), "nolah": [*NOLAH[:4], None]}),
        made_up({"muon": list(BASELINE), "nolah": [*NOLAH[:4], "failed"]}),
        made_up({"muon": list(BASELINE), "nolah": NOLAH}, findings=["a line was edited"]),
    ],
)
def test_nothing_is_picked_before_all_is_known(standing: Standing) -> None:
    assert selection.mean_losses(standing) is None


@pytest.mark.parametrize(("text", "known"), [(None, False), ("{}", False), ("whole", True)])
def test_by_what_a_study_was_selected_is_read_from_the_other_ones_report(
    layout: Layout, text: str | None, known: bool
) -> None:
    declare(layout)
    confirm(layout)
    standing = made_up({"muon": list(BASELINE), "nolah": NOLAH, "good": STRONG})
    if text is not None:
        layout.reports("010-x").mkdir(parents=True)
        (layout.reports("010-x") / "stats.json").write_text(standing.model_dump_json() if known else text)

    def read(slug: str) -> Study:
        return load_study(layout, slug)

    found = selection.state_of(layout, read("011-y"), read)
    assert found is not None
    assert (found.study, found.out_of, found.same_workload) == ("010-x", 2, True)
    assert (found.picked, found.means) == (("good", selection.mean_losses(standing)) if known else (None, {}))
    assert selection.state_of(layout, read("010-x"), read) is None


def test_a_study_starts_only_with_the_challenger_that_was_picked(layout: Layout) -> None:
    """On an override, too; from its first result on it is what it was registered as."""
    params = load_params(PROJECT / "params.yaml")
    unpriced = {"workload": "tiny", "twins": {}, "price_usd_per_gpu_hour": 0, "budget_usd": 0}
    declare(layout, **unpriced)
    confirm(layout, **unpriced)
    study = load_study(layout, "011-y")

    def refused() -> str:
        with pytest.raises(UsageError) as caught:
            register(layout, params, study, override=True)
        assert str(caught.value) in obstacles(layout, params, study)
        return str(caught.value)

    assert "nolah cannot be checked to be what 010-x picks" in refused()
    layout.reports("010-x").mkdir(parents=True)
    report = layout.reports("010-x") / "stats.json"
    report.write_text(made_up({"muon": list(BASELINE), "nolah": NOLAH, "orthonoise": STRONG}).model_dump_json())
    assert "nolah is declared, and the results of 010-x pick orthonoise; `muon study select 011-y`" in refused()
    assert not (layout.study("011-y") / "registration.json").exists()
    other = report.read_text()
    report.write_text(made_up({"muon": list(BASELINE), "nolah": STRONG, "orthonoise": NOLAH}).model_dump_json())
    held = register(layout, params, study)
    assert list(obstacles(layout, params, study)) == []
    report.write_text(other)  # registered, and not started yet
    refused()
    ledger.append(layout.ledger, [record("muon", 20, 4.0, study="011-y", registration=held.registration)])
    assert register(layout, params, study) == held
    assert list(obstacles(layout, params, study)) == []


def picked(out: str | None, **changes: object) -> Standing:
    standing = made_up({"muon": list(BASELINE), "nolah": NOLAH}, selected_from="010-x")
    means = {"nolah": 4.3, "other": 4.2} if out else {}
    if out:
        means[out] = 4.1
    its = {"study": "010-x", "out_of": 13, "same_workload": True, "means": means, "picked": out, **changes}
    snapshot = standing.snapshot.model_copy(update={"selection": Selection.model_validate(its)})
    return standing.model_copy(update={"snapshot": snapshot})


def test_the_report_says_out_of_how_many_and_on_what_it_is_confirmed() -> None:
    (said,) = selection_notes(picked("nolah").snapshot)
    assert said.startswith(
        "Selected: nolah, out of 13 arms by the study 010-x (the lowest mean final loss there, 4.1000"
    )
    assert "confirmed here on new seeds only" in said
    (elsewhere,) = selection_notes(picked("nolah", same_workload=False).snapshot)
    assert "confirmed here on another workload, tiny, only" in elsewhere
    (unknown,) = selection_notes(picked(None).snapshot)
    assert unknown.startswith("Declared as selected from 010-x, which could not be checked")
    assert "out of" not in unknown
    assert "Selected" not in unknown
    page = build(picked("nolah"), pictures=())
    text = {section.title: repr(section.blocks) for section in page.sections}
    for title in ("What was declared", "Limits of this study"):
        assert said in text[title]
    assert selection_notes(made_up({"muon": list(BASELINE), "nolah": NOLAH}).snapshot) == []


def test_another_challenger_than_the_pick_is_said_first() -> None:
    standing = picked("other")
    (doubt,) = selection_doubts(standing.snapshot)
    assert "whose results pick other out of 13 arms" in doubt
    assert doubt in build(standing, pictures=()).warnings
    assert selection_doubts(picked("nolah").snapshot) == []


def first_difference(one: str, other: str) -> int:
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def test_selecting_changes_the_challengers_and_no_other_character() -> None:
    for path in sorted(PROJECT.glob("experiments/*/study.yaml")):
        text = path.read_text()
        now = with_challenger(text, "another")
        was, told = yaml.safe_load(text)["study"], yaml.safe_load(now)["study"]
        assert told == {**was, "challengers": ["another"]}
        before, after = first_difference(text, now), first_difference(text[::-1], now[::-1])
        replaced = text[before : len(text) - after]
        assert ":" not in replaced, path
        assert "#" not in replaced, path
