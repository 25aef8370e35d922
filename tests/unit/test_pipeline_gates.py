"""Gates: which requirement can be declared, and when it is open; what is archived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reporting_studies import BASELINE, NOISY, STRONG, made_up, record, shifted

from muonlab.pipeline.archive import _refuse_verdict, archive_arm
from muonlab.pipeline.declare import register
from muonlab.pipeline.gates import Archived, gate_states, gates_of, read_archive, refuse_closed
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.registered import read_registration, write_registration
from muonlab.pipeline.resolve import load_params, load_study
from muonlab.pipeline.sharing import SHARED
from muonlab.registry import ledger
from muonlab.registry.errors import IntegrityError, UsageError
from muonlab.registry.study import Study
from muonlab.reporting.index import read_judged, summarize
from muonlab.reporting.standing import verdict_json

WORSE = shifted([-0.5, -0.52, -0.49, -0.51, -0.5])
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
FIRST, THEN = "001-made-up", "002-then"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A repository with the study 001-made-up, which has no report yet."""
    layout = Layout(root=tmp_path, main=tmp_path)
    declare(layout, FIRST, passes={"go": True}, challengers=["nolah", "strong"])
    return layout


def declare(layout: Layout, name: str, **changes: Any) -> None:
    study = {
        "slug": name, "question": "?", "workload": "tiny", "baseline": "muon", "challengers": ["nolah"],
        "seeds": [0, 1, 2, 3, 4], "decision": {"min_effect": "0.5%"}, "price_usd_per_gpu_hour": 0, "budget_usd": 0,
        **changes,
    }  # fmt: skip
    folder = layout.root / "experiments" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({"study": study}))


def then(layout: Layout, *requires: dict[str, str], **changes: Any) -> Study:
    declare(layout, THEN, requires=list(requires), **changes)
    return load_study(layout, THEN)


def report(layout: Layout, arms: dict[str, Any], **made: Any) -> None:
    """Write the verdict.json of 001-made-up with these outcomes."""
    standing = made_up(arms, **made)
    folder = layout.root / "reports" / FIRST
    folder.mkdir(parents=True, exist_ok=True)
    content = {**verdict_json(standing, "."), "summary": summarize(standing).model_dump(mode="json")}
    (folder / "verdict.json").write_text(json.dumps(content))


def archived(arm: str, verdict: str = "NO_GO", study: str = FIRST) -> Archived:
    return Archived(
        arm=arm, study=study, verdict=verdict, registration="ab", decided_at="2025-01-02T03:04:05+00:00", commit=None,
        ledger_sha256="",
    )  # fmt: skip


def archive(layout: Layout, *entries: Archived) -> None:
    path = layout.root / "experiments" / "archived.json"
    path.write_text(json.dumps([entry.model_dump() for entry in entries]))


def is_open(layout: Layout, **requirement: str) -> bool:
    (state,) = gate_states(layout, then(layout, {"study": FIRST, **requirement}))
    return state.is_open


BOTH = {"muon": BASELINE, "nolah": WORSE, "strong": STRONG}


# What can be declared


def refused(layout: Layout, slug: str = THEN) -> str:
    with pytest.raises(UsageError) as caught:
        load_study(layout, slug)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def test_the_required_study_must_exist(layout: Layout) -> None:
    declare(layout, THEN, requires=[{"study": "001-made-upp", "verdict": "GO"}])
    assert f"Did you mean '{FIRST}'?" in refused(layout)


def test_a_study_cannot_require_itself(layout: Layout) -> None:
    declare(layout, THEN, requires=[{"study": THEN, "verdict": "GO"}])
    assert "requires itself" in refused(layout)


def test_a_circle_is_named_in_full_from_every_study_that_needs_it(layout: Layout) -> None:
    for slug, needed in (("a", "b"), ("b", "c"), ("c", "a"), ("outside", "b")):
        declare(layout, slug, requires=[{"study": needed, "verdict": "GO"}])
    assert ": a -> b -> c -> a." in refused(layout, "a")
    assert ": b -> c -> a -> b." in refused(layout, "outside")
    declare(layout, "c", requires=[])
    assert load_study(layout, "outside").requires


def test_two_ways_to_one_study_are_no_circle(layout: Layout) -> None:
    for slug, needed in (("b", [FIRST]), ("c", [FIRST]), ("d", ["b", "c"])):
        declare(layout, slug, requires=[{"study": name, "verdict": "GO"} for name in needed])
    assert len(load_study(layout, "d").requires) == 2


def test_it_asks_for_what_the_other_study_can_come_to(layout: Layout) -> None:
    declare(layout, THEN, requires=[{"study": FIRST, "verdict": "GO", "arm": "muon"}])
    assert "unknown challenger 'muon'; allowed: nolah, strong" in refused(layout)
    declare(layout, THEN, requires=[{"study": FIRST, "verdict": "PASSED", "arm": "nolah"}])
    assert "as a whole" in refused(layout)
    declare(layout, FIRST)
    declare(layout, THEN, requires=[{"study": FIRST, "verdict": "PASSED"}])
    assert "declares no `passes`" in refused(layout)
    declare(layout, "900-tune", kind="tuning", decision=None, grid={"lr": [0.1]})
    declare(layout, THEN, requires=[{"study": "900-tune", "verdict": "GO"}])
    assert "a tuning study" in refused(layout)


def test_a_criterion_asks_for_what_the_study_has(layout: Layout) -> None:
    declare(layout, THEN, passes={"go": True, "control_worse": True})
    assert "name a control arm" in refused(layout)
    declare(layout, THEN, kind="tuning", decision=None, grid={"lr": [0.1]}, passes={"finished": True})
    assert "study.passes" in refused(layout)


def test_two_studies_with_one_slug(layout: Layout) -> None:
    declare(layout, THEN, slug=FIRST)
    sentence = refused(layout)
    assert f"experiments/{THEN}/study.yaml" in sentence
    assert f"slug is '{FIRST}', which is the study in experiments/{FIRST}" in sentence


# When a gate is open


def test_without_a_report_every_gate_is_closed(layout: Layout) -> None:
    for verdict in ("GO", "NO_GO", "EQUIVALENT", "PASSED", "ARCHIVED"):
        assert not is_open(layout, verdict=verdict)


def test_a_verdict_opens_it_on_the_arm_or_on_any(layout: Layout) -> None:
    report(layout, BOTH, passes={"go": True})
    assert is_open(layout, verdict="GO")
    assert is_open(layout, verdict="GO", arm="strong")
    assert not is_open(layout, verdict="GO", arm="nolah")
    assert is_open(layout, verdict="NO_GO", arm="nolah")
    assert not is_open(layout, verdict="EQUIVALENT")


def test_passed_opens_it_and_failed_open_or_not_judged_does_not(layout: Layout) -> None:
    for arms, expected in (
        (BOTH, True),
        ({**BOTH, "strong": WORSE}, False),
        ({**BOTH, "strong": NOISY}, False),
    ):
        report(layout, arms, passes={"go": True})
        assert is_open(layout, verdict="PASSED") is expected
    report(layout, BOTH)
    assert not is_open(layout, verdict="PASSED")


def test_a_partial_report_opens_nothing(layout: Layout) -> None:
    report(layout, {**BOTH, "late": [*BASELINE[:4], None]}, passes={"go": True})
    for verdict in ("GO", "NO_GO", "PASSED"):
        assert not is_open(layout, verdict=verdict)
    (state,) = gate_states(layout, load_study(layout, THEN))
    assert "partial" in state.found


def test_a_report_that_cannot_be_read_opens_nothing_and_says_so(layout: Layout) -> None:
    report(layout, BOTH)
    (layout.root / "reports" / FIRST / "verdict.json").write_text("{}")
    assert not is_open(layout, verdict="GO")
    assert "no report that can be read" in gate_states(layout, load_study(layout, THEN))[0].found


def test_an_amended_plan_is_named(layout: Layout) -> None:
    report(layout, BOTH, amended=True)
    (state,) = gate_states(layout, then(layout, {"study": FIRST, "verdict": "NO_GO"}))
    assert state.is_open
    assert "its plan amended" in state.found


def test_archiving_opens_it_while_the_verdict_still_bears_it_out(layout: Layout) -> None:
    report(layout, BOTH)
    asked = {"verdict": "ARCHIVED", "arm": "nolah"}
    assert not is_open(layout, **asked)
    archive(layout, archived("nolah"))
    assert (layout.root / "reports" / FIRST / "verdict.json").exists()
    states = gate_states(layout, then(layout, {"study": FIRST, **asked}, challengers=["orthonoise"]))
    assert [state.is_open for state in states] == [True]
    report(layout, {**BOTH, "nolah": STRONG})
    states = gate_states(layout, load_study(layout, THEN))
    assert [state.is_open for state in states] == [False]
    archive(layout, archived("nolah", study="another"))
    report(layout, BOTH)
    assert not gate_states(layout, load_study(layout, THEN))[0].is_open


def test_an_archived_arm_closes_a_study_that_uses_it_in_any_role_until_it_is_registered(layout: Layout) -> None:
    archive(layout, archived("nolah"))
    for arms in ({"challengers": ["nolah"]}, {"baseline": "nolah", "challengers": ["x"]},
                 {"challengers": ["x"], "reference": ["nolah"]}):  # fmt: skip
        (state,) = gate_states(layout, then(layout, **arms))
        assert not state.is_open
        assert "archived as NO_GO by 001-made-up" in state.found
    assert gate_states(layout, then(layout, challengers=["x"])) == []
    archive(layout)
    study = then(layout)
    held = register(layout, PARAMS, study)
    archive(layout, archived("nolah"))
    assert gate_states(layout, study) == []
    assert register(layout, PARAMS, study) == held
    edited = held.model_copy(update={"declaration": {**held.declaration, "arms": {}}})
    write_registration(layout, THEN, edited)
    assert [state.is_open for state in gate_states(layout, study)] == [False]


def test_an_archived_arm_that_is_added_to_a_registered_study_is_asked_about(layout: Layout) -> None:
    """Before the first result the declaration is replaced, after it the plan is amended; the gate is asked in both."""
    register(layout, PARAMS, then(layout, challengers=["orthonoise"]))
    archive(layout, archived("nolah"))
    more = then(layout, challengers=["orthonoise", "nolah"])
    with pytest.raises(UsageError, match="asks for nolah not to be archived"):
        register(layout, PARAMS, more)
    register(layout, PARAMS, then(layout, challengers=["orthonoise"], question="!"))  # the arms of before are free
    held = register(layout, PARAMS, then(layout, challengers=["orthonoise"]))
    layout.ledger.parent.mkdir(exist_ok=True)
    ledger.append(layout.ledger, [record("muon", 0, 4.0, study=THEN, registration=held.registration)])
    with pytest.raises(UsageError, match="asks for nolah not to be archived"):
        register(layout, PARAMS, more)
    assert read_registration(layout, THEN) == held
    overridden = register(layout, PARAMS, more, override=True)
    assert (overridden.registration, len(overridden.overrides)) == (held.registration, 1)
    assert overridden.is_whole
    assert register(layout, PARAMS, more) == read_registration(layout, THEN) == overridden


def test_a_registration_that_is_replaced_keeps_its_overrides_and_asks_no_gate_twice(layout: Layout) -> None:
    asks = {"study": FIRST, "verdict": "GO", "arm": "nolah"}
    first = register(layout, PARAMS, then(layout, asks), override=True)
    assert len(first.overrides) == 1
    report(layout, BOTH)  # what is found has changed, and what is asked has not
    second = register(layout, PARAMS, then(layout, asks, question="!"))
    assert second.registration != first.registration
    assert second.overrides == first.overrides
    other = {"study": FIRST, "verdict": "EQUIVALENT"}
    with pytest.raises(UsageError) as caught:
        register(layout, PARAMS, then(layout, asks, other))
    assert "asks for EQUIVALENT" in str(caught.value)
    assert "asks for GO" not in str(caught.value)
    third = register(layout, PARAMS, then(layout, asks, other), override=True)
    assert third.overrides[0] == first.overrides[0]
    assert [gate.split(";")[0] for gate in third.overrides[1].gates] == [
        f"asks for EQUIVALENT on a challenger of {FIRST}"
    ]


def test_a_twin_and_what_others_report_have_no_gate(layout: Layout) -> None:
    archive(layout, archived("nolah"))
    study = then(layout, {"study": FIRST, "verdict": "GO"}, twins={"tiny": {"workload": "small", "seeds": 2}})
    assert len(gate_states(layout, study)) == 2
    assert gate_states(layout, load_study(layout, f"{THEN}-tiny")) == []


def test_a_closed_gate_refuses_in_one_sentence_or_is_recorded(layout: Layout) -> None:
    study = then(layout, {"study": FIRST, "verdict": "ARCHIVED", "arm": "nolah"})
    with pytest.raises(UsageError) as caught:
        refuse_closed(study, gate_states(layout, study), None, override=False)
    said = str(caught.value)
    assert said.startswith(
        f"experiments/{THEN}: it asks for nolah to be archived by {FIRST}; found: no report of it yet;"
    )
    assert f"`muon study run {FIRST}`" in said
    assert f"`muon archive nolah --study {FIRST}`" in said
    assert "--override" in said
    (override,) = refuse_closed(study, gate_states(layout, study), "abc", override=True)
    assert override.commit == "abc"
    assert override.gates == [gate_states(layout, study)[0].sentence]
    report(layout, BOTH)
    opened = then(layout, {"study": FIRST, "verdict": "NO_GO"})
    assert refuse_closed(opened, gate_states(layout, opened), None, override=True) == []
    assert [line for gate in gates_of(layout, opened) for line in gate.lines()] == [
        f"Gate open: asks for NO_GO on a challenger of {FIRST}; found: nolah NO_GO, strong GO."
    ]


# The archive


def test_a_file_that_is_no_archive_is_refused(layout: Layout) -> None:
    assert read_archive(layout) == []
    (layout.root / "experiments" / "archived.json").write_text('[{"arm": "nolah"}]')
    with pytest.raises(IntegrityError, match="take it back from git"):
        read_archive(layout)


def test_it_is_shared() -> None:
    assert "experiments/archived.json" in SHARED


def test_only_a_challenger_of_a_comparison_that_was_run_and_reported_can_be_archived(layout: Layout) -> None:
    declare(layout, "900-tune", kind="tuning", decision=None, grid={"lr": [0.1]})
    then(layout, twins={"tiny": {"workload": "small", "seeds": 2}})
    for arm, slug, why in (
        ("muon", FIRST, "unknown challenger 'muon'"),
        ("nolah", FIRST, "it has no report"),
        ("nolah", "900-tune", "a tuning study"),
        ("nolah", f"{THEN}-tiny", f"a rehearsal of {THEN}"),
        ("nolah", "nowhere", "unknown study"),
    ):
        with pytest.raises(UsageError, match=why):
            archive_arm(layout, arm, slug)
    assert read_archive(layout) == []


def test_a_report_that_was_partial_or_has_become_so_archives_nothing_and_says_why(layout: Layout) -> None:
    for arms, complete, says in (
        (BOTH, False, "it has the study complete, and by the evidence there is now it is incomplete"),
        ({**BOTH, "late": [*BASELINE[:4], None]}, True, "it has the study incomplete, and by the evidence"),
        ({**BOTH, "late": [*BASELINE[:4], None]}, False, f"experiments/{FIRST}: it is not complete"),
    ):
        report(layout, arms)
        judged = read_judged(layout.reports(FIRST))
        assert judged is not None
        with pytest.raises(UsageError) as caught:
            _refuse_verdict(judged, "nolah", "NO_GO", complete=complete)
        assert says in str(caught.value)
    report(layout, BOTH)
    judged = read_judged(layout.reports(FIRST))
    assert judged is not None
    _refuse_verdict(judged, "nolah", "NO_GO", complete=True)
