"""Whether a study as a whole has passed: what is shown passes, what is shown otherwise fails, all else is open."""

from __future__ import annotations

import numpy as np
import pytest
from reporting_studies import BASELINE, NOISY, STRONG, made_up, record, shifted

from muonlab.registry.snapshot import GateState, Override
from muonlab.registry.study import Study
from muonlab.reporting.criteria import Passed, judge_passes
from muonlab.reporting.document import build
from muonlab.reporting.gate_wording import gate_sentences, gate_warnings
from muonlab.reporting.index import summarize
from muonlab.reporting.standing import Standing, judge, verdict_json
from muonlab.stats.decision import decide_family
from muonlab.stats.rule import Rule
from muonlab.stats.sample import PairedSample

FIXED_5 = {"plan": {"fixed": 5}}
FIXED_2 = {"plan": {"fixed": 2}, "n_min": 2}
MIXED = shifted([0.02, -0.02, 0.01, -0.01, 0.005])
WORSE = shifted([-0.5, -0.52, -0.49, -0.51, -0.5])
"""By about 11.7 %."""


def outcome(standing: Standing) -> Passed:
    assert standing.passed is not None
    return standing.passed


def study(*, passes: dict[str, object], **made: object) -> Standing:
    made = {"arms": {"muon": BASELINE, "nolah": MIXED}, "decision": FIXED_5, **made}
    arms = made.pop("arms")
    return made_up(arms, passes=passes, **made)  # type: ignore[arg-type]


def test_a_study_without_a_criterion_has_no_outcome() -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOISY})
    assert standing.passed is None
    assert verdict_json(standing, "")["passed"] is None
    assert summarize(standing).passed is None
    assert "Pass criterion" not in str(build(standing, pictures=()))


# finished


def test_finished_is_passed_by_runs_that_all_ended_with_a_loss() -> None:
    assert outcome(study(passes={"finished": True})).verdict is True


def test_a_diverged_run_fails_it_and_a_failed_or_missing_one_leaves_it_open() -> None:
    for lost, expected in (("diverged", False), ("failed", None), ("abandoned", None), (None, None)):
        arms = {"muon": BASELINE, "nolah": [*MIXED[:4], lost]}
        assert outcome(study(passes={"finished": True}, arms=arms)).verdict is expected, lost


def test_a_control_belongs_to_the_declared_runs() -> None:
    arms = {"muon": BASELINE, "nolah": MIXED, "isotropic": [*MIXED[:4], "diverged"]}
    assert outcome(study(passes={"finished": True}, arms=arms, control=["isotropic"])).verdict is False


# within


def test_within_passes_what_is_shown_inside_and_fails_what_is_shown_outside() -> None:
    assert outcome(study(passes={"within": "5%"})).verdict is True
    worse = study(passes={"within": "5%"}, arms={"muon": BASELINE, "nolah": WORSE})
    assert outcome(worse).verdict is False
    assert "at best" in outcome(worse).reasons[0]
    wide = study(passes={"within": "20%"}, arms={"muon": BASELINE, "nolah": WORSE})
    assert outcome(wide).verdict is True


def test_a_mean_inside_is_not_enough() -> None:
    noisy = shifted([0.3, -0.4, 0.35, -0.3, 0.0])
    found = outcome(study(passes={"within": "5%"}, arms={"muon": BASELINE, "nolah": noisy}))
    assert found.verdict is None
    assert "open" in found.reasons[0]


def test_every_challenger_must_be_within() -> None:
    arms = {"muon": BASELINE, "nolah": MIXED, "wild": shifted([0.3, -0.4, 0.35, -0.3, 0.0])}
    assert outcome(study(passes={"within": "5%"}, arms=arms)).verdict is None
    assert outcome(study(passes={"within": "5%"}, arms={**arms, "wild": WORSE})).verdict is False


def test_each_challenger_is_tested_at_alpha_whatever_their_number() -> None:
    """Intersection-union: more challengers make it no harder for one of them, and one alone fails it at alpha / K."""
    edge = shifted([-0.30, -0.12, -0.10, -0.28, -0.05])
    one = outcome(study(passes={"within": "6.5%"}, arms={"muon": BASELINE, "a": edge}))
    many = {"muon": BASELINE, "a": edge, **dict.fromkeys("bcdefg", MIXED)}
    assert one.verdict is True
    assert outcome(study(passes={"within": "6.5%"}, arms=many)).verdict is True
    over = shifted([-0.45, -0.32, -0.40, -0.30, -0.35])
    assert outcome(study(passes={"within": "7%"}, arms={"muon": BASELINE, "a": over})).verdict is False
    assert outcome(study(passes={"within": "7%"}, arms={**many, "a": over})).verdict is None


def test_two_pairs_pass_in_the_one_look_of_a_fixed_plan_and_never_in_a_sequential_one() -> None:
    arms = {"muon": BASELINE[:2], "nolah": MIXED[:2]}
    assert outcome(study(passes={"within": "5%"}, arms=arms, decision=FIXED_2)).verdict is True
    found = outcome(study(passes={"within": "5%"}, arms=arms, decision={}))
    assert found.verdict is None
    assert "from 4 on" in found.reasons[0]


def test_a_diverged_run_is_never_within() -> None:
    both = {"muon": [*BASELINE[:4], "diverged"], "nolah": [*MIXED[:4], "diverged"]}
    found = outcome(study(passes={"within": "5%"}, arms=both))
    assert found.verdict is None
    assert "diverged" in found.reasons[0]


def test_arms_that_may_have_been_picked_are_tested_at_a_smaller_level() -> None:
    made = study(passes={"within": "5%"})
    samples = {"nolah": PairedSample.of("nolah", BASELINE, shifted([-0.3, -0.05, -0.25, -0.08, -0.22]))}  # type: ignore
    rule = Rule(min_effect=0.5, min_effect_unit="percent", plan="fixed", fixed_n=5)

    def passed(undeclared: int) -> bool | None:
        (decision,) = decide_family(list(samples.values()), rule, undeclared=undeclared)
        found = judge_passes(made.snapshot.study, rule, samples, {"nolah": decision}, made.cells)
        assert found is not None
        return found.verdict

    width = 6.8
    declared = made.snapshot.study.model_dump() | {"passes": {"within": f"{width}%"}}
    made = made.model_copy(
        update={"snapshot": made.snapshot.model_copy(update={"study": Study.model_validate(declared)})}
    )
    assert passed(0) is True
    assert passed(7) is None


# go, control_worse


def test_go_passes_with_one_go_fails_when_all_are_decided_otherwise_and_else_is_open() -> None:
    decided = {"muon": BASELINE, "nolah": WORSE}
    assert outcome(study(passes={"go": True}, arms={**decided, "strong": STRONG})).verdict is True
    assert outcome(study(passes={"go": True}, arms=decided)).verdict is False
    assert outcome(study(passes={"go": True}, arms={**decided, "noisy": NOISY})).verdict is None


ASKED = {"go": True, "control_worse": True}


def with_controls(*controls: list[object], **made: object) -> Passed:
    names = [f"control-{i}" for i in range(len(controls))]
    arms = {"muon": BASELINE, "strong": STRONG, **dict(zip(names, controls, strict=True))}
    return outcome(study(passes=ASKED, arms=arms, control=names, **made))


def test_the_challenger_must_be_shown_better_than_every_control() -> None:
    bad, good = shifted([0.01, -0.01, 0.0, 0.005, -0.005]), shifted([0.12, 0.11, 0.125, 0.118, 0.122])
    alike = shifted([0.055, 0.042, 0.058, 0.044, 0.056])
    assert with_controls(bad).verdict is True
    assert with_controls(bad, bad).verdict is True
    assert with_controls(bad, alike).verdict is None
    assert with_controls(bad, good).verdict is False
    assert with_controls([*bad[:4], None]).verdict is None
    assert with_controls(bad, unlike=["control-0"]).verdict is None


def test_a_control_is_paired_by_seed_with_the_challenger_and_not_with_the_baseline() -> None:
    """The control is better than the baseline on every seed; the challenger is better still, and that is asked."""
    half = shifted([0.025, 0.021, 0.028, 0.022, 0.026])
    assert with_controls(half).verdict is True


def test_no_go_leaves_nothing_to_compare_with_the_controls() -> None:
    arms = {"muon": BASELINE, "nolah": WORSE, "isotropic": MIXED}
    assert outcome(study(passes=ASKED, arms=arms, control=["isotropic"])).verdict is False
    arms = {"muon": BASELINE, "noisy": NOISY, "isotropic": MIXED}
    assert outcome(study(passes=ASKED, arms=arms, control=["isotropic"])).verdict is None


# What never passes


def test_what_is_invalid_incomplete_or_reported_has_not_passed() -> None:
    passes = {"within": "50%", "finished": True}
    assert outcome(study(passes=passes)).verdict is True
    assert outcome(study(passes=passes, findings=["an edited line"])).verdict is None
    assert outcome(study(passes=passes, unlike=["nolah"])).verdict is None
    assert outcome(study(passes={"finished": True}, findings=["an edited line"])).verdict is None
    reported = made_up({"muon": [2.0], "nolah": [1.9]}, passes={"finished": True}, provenance="reported")
    assert outcome(reported).verdict is None
    lacking = {"muon": BASELINE, "strong": STRONG, "late": [*STRONG[:4], None]}
    found = outcome(study(passes={"go": True}, arms=lacking))
    assert found.verdict is None
    assert "not complete" in found.reasons[0]


def test_invalid_evidence_does_not_fail_a_study_either() -> None:
    arms = {"muon": BASELINE, "nolah": WORSE}
    assert outcome(study(passes={"within": "5%"}, arms=arms, findings=["an edited line"])).verdict is None


def test_all_that_is_asked_must_hold() -> None:
    arms = {"muon": BASELINE, "strong": STRONG}
    assert outcome(study(passes={"go": True, "within": "5%", "finished": True}, arms=arms)).verdict is True
    arms = {"muon": BASELINE, "strong": STRONG, "nolah": WORSE}
    assert outcome(study(passes={"go": True, "within": "5%"}, arms=arms)).verdict is False


# Calibration: each at the edge of its null hypothesis


def rate(sample: str, *, looks: range, rule: Rule, studies: int, challengers: int = 1) -> float:
    """Share of simulated studies that are said, at some look, to be `within` 5 % or `control_worse`, wrongly."""
    rng = np.random.default_rng(20240607)
    names = [f"c{i}" for i in range(challengers)]
    declared = {
        "slug": "001-made-up", "question": "?", "workload": "tiny", "baseline": "muon", "challengers": names,
        "control": ["control"], "seeds": list(range(looks[-1])), "price_usd_per_gpu_hour": 0, "budget_usd": 0,
        "decision": {"min_effect": "0.5%", "plan": {"fixed": looks[-1]}, "n_min": 2},
        "passes": {"within": "5%"} if sample == "within" else ASKED,
    }  # fmt: skip
    made = Study.model_validate(declared)
    cells = [c.model_copy(update={"state": "completed"}) for c in study(passes={"finished": True}).cells[:1]]
    wrong = 0
    for _ in range(studies):
        base = 4 + 0.1 * rng.standard_normal(looks[-1])
        noise = 0.02 * rng.standard_normal((challengers + 1, looks[-1]))
        for n in looks:
            # Within: the first challenger is exactly 5 % worse, the others are well inside. Control: as good as the
            # first challenger, which is far better than the baseline.
            if sample == "within":
                means = [base * 1.05, *[base] * (challengers - 1), base]
            else:
                means = [base - 1] * (challengers + 1)
            arms = dict(zip([*names, "control"], (m + e for m, e in zip(means, noise, strict=True)), strict=True))
            samples = {a: PairedSample.of(a, base[:n], x[:n]) for a, x in arms.items()}
            decided = decide_family([samples[name] for name in names], rule)
            found = judge_passes(made, rule, samples, {d.arm: d for d in decided}, cells)
            assert found is not None
            if found.verdict is True:
                wrong += 1
                break
    return wrong / studies


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["within", "control"])
def test_it_passes_wrongly_in_one_of_twenty_studies_at_most(asked: str) -> None:
    studies = 300
    error = 3 * np.sqrt(0.05 * 0.95 / studies)
    sequential = Rule(min_effect=0.5, min_effect_unit="percent", n_max=6)
    fixed = Rule(min_effect=0.5, min_effect_unit="percent", plan="fixed", fixed_n=2, n_min=2)
    assert rate(asked, looks=range(4, 7), rule=sequential, studies=studies) < 0.05 + error
    assert rate(asked, looks=range(2, 3), rule=fixed, studies=studies, challengers=2) < 0.05 + error


# What is said


def test_it_stands_near_the_top_and_in_the_reasons_and_in_the_index() -> None:
    standing = study(passes={"within": "5%"})
    document = build(standing, pictures=())
    assert document.lead[1].startswith("Pass criterion of the study: passed (within 5%: holds, nolah is at worst ")
    reasons = next(section for section in document.sections if section.title == "Reasons")
    assert reasons.blocks[-1].title == "Pass criterion of the study: passed"  # type: ignore[union-attr]
    assert summarize(standing).passed == "passed"
    partial = build(standing, pictures=(), partial=True)
    assert "Pass criterion" not in str(partial.lead)


def gated(*gates: GateState, overrides: list[Override], runs: bool = True) -> Standing:
    snapshot = made_up({"muon": BASELINE, "nolah": NOISY}).snapshot
    assert snapshot.registration is not None
    registration = snapshot.registration.model_copy(update={"overrides": overrides})
    records = snapshot.records if runs else [record("muon", 0, "failed")]
    changes = {"gates": list(gates), "registration": registration, "records": records}
    return judge(snapshot.model_copy(update=changes), [])


CLOSED = GateState(asks="000-first to have passed", found="no report of it yet", is_open=False)
OPEN = CLOSED.model_copy(update={"found": "passed", "is_open": True})


def test_an_override_and_a_gate_that_is_closed_though_results_exist_are_warnings() -> None:
    override = Override(at="2025-01-02T03:04:05+00:00", commit=None, gates=[CLOSED.sentence])
    assert gate_warnings(gated(OPEN, overrides=[])) == []
    assert gate_warnings(gated(CLOSED, overrides=[], runs=False)) == []
    (closed,) = gate_warnings(gated(CLOSED, overrides=[]))
    assert closed.startswith("Started against its gate")
    (known,) = gate_warnings(gated(CLOSED, overrides=[override]))
    assert "--override on 2025-01-02 03:04 UTC" in known
    assert len(gate_warnings(gated(OPEN, overrides=[override]))) == 1
    assert set(gate_warnings(gated(CLOSED, overrides=[override]))) <= set(
        build(gated(CLOSED, overrides=[override]), pictures=()).warnings
    )
    assert "open" in gate_sentences(gated(OPEN, overrides=[]))[0]


def test_the_next_step_names_the_command_that_archives() -> None:
    (_, next_, _) = build(made_up({"muon": BASELINE, "nolah": WORSE}), pictures=()).lead
    assert "`muon archive nolah --study 001-made-up` records that" in next_
    incomplete = made_up({"muon": BASELINE, "nolah": WORSE, "late": [*MIXED[:4], None]})
    assert "muon archive" not in str(build(incomplete, pictures=()).lead)
