"""What was declared after results: the plan counts as amended, and the arms it may have been picked from count too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, TRIVIAL, Outcome, digest, made_up, shifted

from muonlab.registry.record import RunRecord
from muonlab.registry.snapshot import KnownRun, Snapshot
from muonlab.registry.verdict import Verdict
from muonlab.reporting.document import build
from muonlab.reporting.standing import Standing, judge, verdict_json, with_false_go
from muonlab.reporting.wording import correction_text, family_text, limits, next_step, orthogonalizers

ARMS: dict[str, Sequence[Outcome]] = {"muon": BASELINE, "nolah": STRONG, "isotropic": NOISY}


def rejudged(standing: Standing, change: Mapping[str, object], **records: object) -> Standing:
    """The same study judged again, with its snapshot changed, and these values in every record but the baseline's."""

    def edited(record: RunRecord) -> RunRecord:
        return record if record.arm == "muon" else record.model_copy(update=records)

    held = [edited(record) for record in standing.snapshot.records]
    return judge(standing.snapshot.model_copy(update={"records": held, **change}), [])


def outside(*runs: tuple[str, int, int], study: str | None = None) -> list[KnownRun]:
    """(arm, seed, variant)"""
    return [
        KnownRun(arm=arm, seed=seed, digest=digest(f"{arm}/{variant}", seed), study=study)
        for arm, seed, variant in runs
    ]


def only(standing: Standing) -> object:
    (comparison,) = standing.decided
    assert comparison.decision is not None
    return comparison.decision


def test_a_plan_as_it_was_registered_is_not_amended():
    standing = made_up(ARMS, control=["isotropic"])
    assert standing.snapshot.amendments == []
    assert (standing.undeclared, only(standing).family_size) == (0, 1)


def test_runs_that_were_there_before_the_declaration_amend_the_plan():
    standing = rejudged(made_up(ARMS, control=["isotropic"]), {}, study=None)
    (reason,) = standing.snapshot.amendments
    assert "not made under this declaration but before or beside it: nolah-0" in reason
    # The control's runs were there as well: it could have been the challenger.
    assert (standing.undeclared, only(standing).family_size) == (1, 2)
    assert "1 arm declared as control or reference after a result" in family_text(standing)
    lead = build(standing, pictures=()).warnings
    assert any(text.startswith("Plan amended: ") for text in lead)
    assert any(text.startswith("Family: ") for text in lead)


def test_other_arms_count_only_where_the_challenger_may_have_been_picked():
    runs = outside(("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("b", 0, 1), ("b", 1, 0), study="002-other")
    named = rejudged(made_up(ARMS, control=["isotropic"]), {"outside": runs})
    assert named.tried == {"a": 1, "b": 2}
    assert (named.undeclared, named.snapshot.amended) == (0, False)
    assert "3 other arms or variants were run on these seeds beside this study (a and b (2 variants))" in family_text(
        named
    )
    assert any(text.startswith("Other arms: ") for text in limits(named))

    picked = rejudged(made_up(ARMS, control=["isotropic"]), {"outside": runs}, study="002-other")
    assert only(picked).family_size == 1 + 3 + 1
    assert only(picked).p_adjusted == pytest.approx(5 * only(named).p_adjusted)
    assert verdict_json(picked, "")["undeclared"] == 4


def test_a_challenger_that_was_dropped_or_demoted_stays_in_the_family():
    whole = made_up({**ARMS, "other": TRIVIAL}, control=["isotropic"])
    study = whole.snapshot.study
    demoted = study.model_copy(update={"challengers": ["nolah"], "control": ["isotropic", "other"]})
    changed = {"study": demoted, "current_registration": "cd" * 32}
    assert rejudged(whole, changed).undeclared == 1  # isotropic was registered as a control
    left = {
        "study": study.model_copy(update={"challengers": ["nolah"]}),
        "cells": [cell for cell in whole.snapshot.cells if cell.arm != "other"],
        "outside": outside(("other", 0, 0)),
        "current_registration": "cd" * 32,
    }
    assert rejudged(whole, left).undeclared == 1
    assert rejudged(whole, {"current_registration": "cd" * 32}).undeclared == 0  # the same arms: only the rule changed


@pytest.mark.parametrize("registration", ["made anew", None])
def test_a_registration_that_was_made_anew_is_no_registration(registration: str | None):
    standing = made_up(ARMS, control=["isotropic"])
    change: dict[str, object] = {"current_registration": "cd" * 32, "registration": None}
    held = standing.snapshot.registration
    assert held is not None
    if registration:
        change["registration"] = held.model_copy(update={"registration": "cd" * 32})
    again = rejudged(standing, change)
    assert "recorded under another declaration" in again.snapshot.amendments[0]
    assert only(again).family_size == 2  # nobody knows any more which arms were only to be described


def known(snapshot: Snapshot, *seeds: int, study: str | None) -> list[KnownRun]:
    return [
        KnownRun(arm=arm, seed=seed, digest=digest(arm, seed), study=study)
        for seed in seeds
        for arm in ("muon", "nolah")
    ]


@pytest.mark.parametrize(
    ("decision", "seeds", "due"),
    [
        ({}, (5, 6), [5, 6]),
        ({}, (6,), []),  # beyond a gap: a sequential plan takes 5 first
        ({}, (12,), []),  # beyond n_max
        ({"plan": {"fixed": 5}}, (8,), [8]),
    ],
)
def test_a_pair_with_a_result_cannot_be_left_out(decision: dict[str, object], seeds: tuple[int, ...], due: list[int]):
    standing = made_up(ARMS, control=["isotropic"], decision=decision)
    own = rejudged(standing, {"left_out": known(standing.snapshot, *seeds, study="001-made-up")})
    assert [
        int(reason.split()[1].rstrip(":")) for reason in only(own).reasons if "leaves the seed out" in reason
    ] == due
    assert (only(own).verdict is Verdict.INCOMPLETE) == bool(due)
    if due:
        assert next_step(own).startswith("Mend first: seed ")
    # Another study's seeds are its own matter, as long as this one's runs were made for it.
    theirs = rejudged(standing, {"left_out": known(standing.snapshot, *seeds, study="002-other")})
    assert only(theirs).verdict is Verdict.GO
    borrowed = {"left_out": known(standing.snapshot, *seeds, study="002-other")}
    assert (only(rejudged(standing, borrowed, study="002-other")).verdict is Verdict.INCOMPLETE) == bool(due)


def test_the_report_names_its_correction():
    two = {"muon": BASELINE, "nolah": NOLAH, "other": shifted([0.03, 0.01, 0.02, 0.035, 0.015])}
    fixed = {"plan": {"fixed": 5}}
    assert correction_text(made_up({"muon": BASELINE, "nolah": NOLAH})).startswith("Correction: none is needed")
    assert "Holm over 2 challengers" in correction_text(made_up(two))
    dunnett = made_up(two, decision={**fixed, "correction": "dunnett"})
    assert "assumes one variance of the noise in all arms" in correction_text(dunnett)
    text = str(build(dunnett, pictures=()))
    assert "Dunnett's test over 2 challengers: p = " in text
    assert "Holm" not in text
    amended = made_up(two, decision={**fixed, "correction": "dunnett"}, amended=True)
    assert "Holm over 2 challengers" in correction_text(amended)
    assert "an amended plan does not use it" in correction_text(amended)


def test_the_error_rate_at_hand_is_that_of_the_same_rule_and_family():
    from muonlab.stats.simulate import false_go_rate

    standing = with_false_go(made_up({"muon": BASELINE, "nolah": NOLAH, "other": NOISY}))
    assert standing.false_go is not None
    d = np.array([[p.difference for p in c.differences] for c in standing.decided]).T
    from muonlab.reporting.standing import _rule

    assert standing.snapshot.study.decision is not None
    own = _rule(standing.snapshot, standing.snapshot.study.decision)
    assert standing.false_go == false_go_rate(d, own, family_size=2)
    assert any("rough picture" in text and "Error rate at hand" in text for text in limits(standing))


def test_an_amended_dunnett_plan_has_an_error_rate_as_holm_decides_it():
    two = {"muon": BASELINE, "nolah": NOLAH, "other": NOISY}
    dunnett, holm = (
        with_false_go(made_up(two, decision={"plan": {"fixed": 5}, "correction": correction}, amended=True))
        for correction in ("dunnett", "holm")
    )
    assert dunnett.false_go is not None
    assert dunnett.false_go == holm.false_go


@pytest.mark.parametrize(
    "standing",
    [
        made_up({"muon": BASELINE[:1], "nolah": NOLAH[:1]}),
        made_up({"muon": BASELINE, "nolah": NOLAH}, findings=["edited"]),
        made_up(
            {"muon": BASELINE, "nolah": NOLAH, "k": NOISY}, decision={"plan": {"fixed": 5}, "correction": "dunnett"}
        ),
    ],
)
def test_no_error_rate_is_claimed_that_was_not_simulated(standing: Standing):
    assert with_false_go(standing).false_go is None
    assert any("Error rate at hand: not simulated" in text for text in limits(standing))


def test_the_orthogonalizer_of_every_arm_is_printed():
    standing = made_up({"muon": BASELINE, "nolah": NOLAH, "adamw": NOISY}, reference=["adamw"])
    assert orthogonalizers(standing) == []
    methods = {"muon": "gram_eigh", "nolah": "auto"}
    named = {
        arm: {"kind": arm, "options": {"lr": 0.1, **({"orthogonalizer": methods[arm]} if arm in methods else {})}}
        for arm in ("muon", "nolah", "adamw")
    }
    standing = rejudged(standing, {"optimizers": named})
    (text,) = orthogonalizers(standing)
    assert text.startswith("Orthogonalizer: muon gram_eigh, nolah auto.")
    assert "do not share one" in text
    assert text in str(build(standing, pictures=()))
