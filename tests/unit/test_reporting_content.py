"""What the report says of the way to the result: early stability, speed to target, diagnostics, and its order."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting_studies import BASELINE, NOISY, NOLAH, STEPS, STRONG, TRIVIAL, Outcome, made_up, record, shifted

from muonlab.pipeline.evaluations import evaluate_folders, read_series
from muonlab.pipeline.layout import Layout
from muonlab.registry.settings import WorkloadSettings
from muonlab.reporting.blocks import Bullets, Document, Paragraph, Pictures, Table
from muonlab.reporting.course_wording import hypotheses, measured, speed_sentence
from muonlab.reporting.document import build
from muonlab.reporting.standing import ArmComparison, Standing, judge
from muonlab.reporting.wording import ABSENT, percent_of
from muonlab.stats.instability import instability
from muonlab.stats.speed import speed_to_target

NO_CLAIM = re.compile(r"no (effect|difference|speedup|change)\b|makes no|does nothing|not faster|are the same", re.I)
SLOW: list[Outcome] = [5.6, 5.7, 5.5, 5.6, 5.6]
"""Ends above the made-up baseline's loss at 40% of the run, about 4.8."""


def section(document: Document, title: str) -> tuple[object, ...]:
    (found,) = (s.blocks for s in document.sections if s.title == title)
    return found


def table(document: Document, title: str) -> Table:
    return next(block for block in section(document, title) if isinstance(block, Table))


def prose(document: Document, title: str) -> str:
    said = [block.text for block in section(document, title) if isinstance(block, Paragraph)]
    said += [text for block in section(document, title) if isinstance(block, Bullets) for text in block.sentences]
    return " ".join(said)


def column(found: Table, title: str) -> dict[str, str]:
    at = [name for name, _ in found.columns].index(title)
    return {row[0]: row[at] for row in found.rows}


def curves(standing: Standing, arm: str) -> np.ndarray:
    """[S, E] after step 0, nan for what is not there."""
    held = [dict(c.curve) for c in standing.cells if c.arm == arm]
    steps = range(30, STEPS + 1, 30)
    return np.array([[curve.get(step) for step in steps] for curve in held], dtype=float)


def only(standing: Standing) -> ArmComparison:
    (comparison,) = standing.comparisons
    return comparison


def said_numbers(text: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


# The series


def write(folder: Path, text: str | bytes) -> Path:
    (folder / "curve.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_series_hold_the_finite_values_of_a_curve(tmp_path):
    text = (
        "step,tokens,seconds,train_loss,val_loss,lr,grad_norm,opt_turn\n"
        "0,0,0.1,,7.7,,,\n10,512,0.2,,,0.01,1.5,nan\n30,1536,0.3,7.2,6.5,0.02,inf,0.25\n"
    )
    assert read_series(write(tmp_path, text)) == {
        "train_loss": [(30, 7.2)],
        "lr": [(10, 0.01), (30, 0.02)],
        "grad_norm": [(10, 1.5)],
        "opt_turn": [(30, 0.25)],
    }


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing\n", "step,lr\n1.5,0.1\n", "step,lr\n1,fast\n", "step,lr\n1\n", "step,lr\n1,2,3\n",
        b"step,lr\n1,\xff\xfe\n", "step,lr\n1,\x002\n", 'step,lr\n1,"2\n',
    ],
)  # fmt: skip
def test_a_broken_curve_gives_no_series(tmp_path, text):
    assert read_series(write(tmp_path, text)) == {}


def test_the_evaluation_of_a_cell_holds_its_series(tmp_path):
    """A diverged cell has no weights to score, and its curve all the same."""
    layout = Layout(tmp_path, tmp_path)
    folders = [tmp_path / "runs" / "s" / f"k-{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders[:2]):
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(record("k", seed, "diverged").model_dump_json())
    write(folders[0], "step,tokens,seconds,train_loss,val_loss,lr\n30,1,1,7.5,30,0.1\n")
    found = list(evaluate_folders(layout, folders, WorkloadSettings(steps=STEPS), tmp_path, workers=1))
    assert [(e.arm, e.seed, e.val_loss) for e in found] == [("k", 0, None), ("k", 1, None)]
    assert [e.series for e in found] == [{"train_loss": [(30, 7.5)], "lr": [(30, 0.1)]}, {}]


def test_a_missing_curve_gives_no_series_and_one_note(tmp_path):
    assert read_series(tmp_path) == {}
    standing = made_up(
        {"muon": BASELINE, "k": NOLAH},
        series={"muon": lambda seed: {} if seed in (1, 3) else {"grad_norm": [(10, 1.0)]}},
    )
    notes = [note for note in standing.notes if "curve.csv" in note]
    assert notes == ["no series can be read from the curve.csv of muon-1, muon-3; the diagnostics are without them"]
    (found,) = standing.diagnostics
    assert found.seeds == [0, 2, 4]


# Early stability


def test_the_early_phase_is_that_of_the_curves():
    standing = made_up({"muon": BASELINE, "nolah": NOLAH}, early={"nolah": 0.09})
    base, ours = curves(standing, "muon"), curves(standing, "nolah")
    expected = ((ours - base) / base)[:, :3].max(axis=1)
    early = only(standing).early
    assert early is not None
    assert early == instability(range(30, STEPS + 1, 30), base, ours, total_steps=STEPS)
    shown = table(build(standing, pictures=()), "Early stability")
    worst = int(expected.argmax())
    assert column(shown, "largest of any seed") == {"nolah": f"{percent_of(expected[worst])} (seed {worst})"}
    assert column(shown, "mean of each seed's largest") == {"nolah": percent_of(expected.mean())}
    regress = only(standing).estimates.early_regress
    assert regress is not None
    assert column(shown, "largest mean lag") == {"nolah": percent_of(regress)}
    assert column(shown, "spikes, its against the baseline's") == {
        "nolah": f"{early.challenger_spikes} against {early.baseline_spikes}"
    }
    assert float(column(shown, "roughness ratio")["nolah"]) == pytest.approx(early.residual_variance_ratio, rel=5e-3)


def test_a_diverged_run_is_not_left_out_of_the_early_phase():
    standing = made_up({"muon": BASELINE, "k": [*TRIVIAL[:4], "diverged"]})
    early = only(standing).early
    assert early is not None
    assert early.regress_by_seed is not None
    # The fixture's diverged run jumps to 30 nats/token at step 90.
    base = curves(standing, "muon")[4, 2]
    assert early.regress_by_seed[4] == pytest.approx((30 - base) / base)
    document = build(standing, pictures=())
    shown = table(document, "Early stability")
    assert "(seed 4)" in column(shown, "largest of any seed")["k"]
    assert column(shown, "roughness ratio") == {"k": ABSENT}
    assert "Not given for spikes and roughness of k: a run lacks evaluations that the other of its pair has." in prose(
        document, "Early stability"
    )


def test_what_a_diverged_run_did_not_reach_counts_with_the_diverged_loss():
    standing = made_up({"muon": BASELINE, "k": [*TRIVIAL[:4], "diverged"]})
    records = [
        r.model_copy(update={"curve": r.curve[:2]}) if (r.arm, r.seed) == ("k", 4) else r
        for r in standing.snapshot.records
    ]
    early = only(judge(standing.snapshot.model_copy(update={"records": records}), [])).early
    assert early is not None
    assert early.regress_by_seed is not None
    base = curves(standing, "muon")[4, :3].min()
    assert early.regress_by_seed[4] == pytest.approx((math.log(2048) - base) / base)


def test_what_is_undefined_is_a_dash_with_its_reason():
    standing = made_up({"muon": BASELINE, "k": NOLAH, "l": [None] * 5})
    document = build(standing, pictures=())
    assert list(column(table(document, "Early stability"), "arm")) == ["k"]
    assert "Not given for l: no seed has a curve in both arms." in prose(document, "Early stability")
    assert "Not given for l: no seed has a curve in both arms." in prose(document, "Speed to target")


# Speed to target


def test_the_speed_is_that_of_the_curves_and_the_sentence_that_of_the_speed():
    standing = made_up({"muon": BASELINE, "k": STRONG})
    base, ours = curves(standing, "muon"), curves(standing, "k")
    steps = np.arange(30.0, STEPS + 1, 30)
    c = only(standing)
    assert c.speed == speed_to_target(steps, base, ours)
    assert c.first_level is not None
    assert c.first_level.target == pytest.approx(np.mean(base[:, 3]))  # step 120 of 300
    assert c.speed is not None
    assert c.speed.ratio_ci95 is not None
    numbers = said_numbers(speed_sentence(standing, c))
    assert c.speed.steps_saved_pct is not None
    expected = [c.speed.steps_saved_pct, c.speed.geometric_mean_ratio, 95, *c.speed.ratio_ci95, 5]
    assert numbers == pytest.approx(expected, rel=0.06)
    assert "fewer steps than muon" in speed_sentence(standing, c)
    shown = table(build(standing, pictures=()), "Speed to target")
    assert float(column(shown, "steps saved")["k"].rstrip("%")) == pytest.approx(c.speed.steps_saved_pct, abs=0.005)
    allowed = [float(x) for x in re.findall(r"[+-]?[\d.]+", column(shown, "the grid allows there")["k"])]
    assert c.first_level.grid_saved_pct is not None
    assert allowed == pytest.approx(c.first_level.grid_saved_pct, abs=0.06)
    assert allowed[0] < 0 < allowed[1]
    assert "The evaluations that are compared are 30 steps apart" in prose(
        build(standing, pictures=()), "Speed to target"
    )


def test_a_run_that_never_arrives_gives_no_mean():
    standing = made_up({"muon": BASELINE, "k": [*NOLAH[:3], *SLOW[3:]], "l": SLOW})
    k, never = standing.comparisons
    assert k.speed is not None
    assert (k.speed.challenger_never, k.speed.geometric_mean_ratio) == (2, None)
    text = speed_sentence(standing, k)
    assert text.startswith("k: 2 of its 5 runs never get to the losses of muon's, and 0 of muon's not to its;")
    assert "no mean is given, the median ratio of steps is 0." in text
    assert "no median" in speed_sentence(standing, never)
    shown = table(build(standing, pictures=()), "Speed to target")
    assert column(shown, "never arrive: its, the baseline's") == {"k": "2, 0", "l": "5, 0"}
    assert column(shown, "steps saved") == {"k": ABSENT, "l": ABSENT}
    assert "Not given for the interval of k:" in prose(build(standing, pictures=()), "Speed to target")


def test_one_pair_has_a_speed_without_an_interval():
    standing = made_up({"muon": BASELINE[:1], "k": STRONG[:1]})
    text = speed_sentence(standing, only(standing))
    assert text.startswith("In the only pair k took ")
    assert "1 pair, no interval: one pair has no spread" in text
    assert "95%" not in text


@given(st.lists(st.floats(-0.2, 0.2), min_size=4, max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_the_speed_never_claims_that_there_is_none(gains):
    standing = made_up({"muon": BASELINE[:4], "k": shifted(gains)})
    c = only(standing)
    assert c.speed is not None
    text = speed_sentence(standing, c)
    assert not NO_CLAIM.search(text)
    if c.speed.ratio_ci95 is not None:
        contains = c.speed.ratio_ci95[0] <= 1 <= c.speed.ratio_ci95[1]
        assert ("neither faster nor slower is established" in text) == contains
        printed = said_numbers(text)[1]
        half = (c.speed.ratio_ci95[1] - c.speed.ratio_ci95[0]) / 2
        assert printed == pytest.approx(c.speed.geometric_mean_ratio, abs=max(0.006, 0.1 * half))


def test_swapping_the_arms_inverts_the_ratio():
    there = only(made_up({"muon": BASELINE, "k": NOISY})).speed
    back = only(made_up({"muon": NOISY, "k": BASELINE})).speed
    assert there is not None
    assert back is not None
    assert there.geometric_mean_ratio == pytest.approx(1 / (back.geometric_mean_ratio or math.nan), rel=0.02)


# Diagnostics


def measures(scale: float):
    def of_seed(seed: int) -> dict[str, list[tuple[int, float]]]:
        def at(*values: float) -> list[tuple[int, float]]:
            return [(10 * (i + 1), scale * value + 0.01 * seed) for i, value in enumerate(values)]

        return {
            "grad_norm": at(1.5, 0.9, 0.6),
            "opt_momentum_rms": at(0.004, 0.003, 0.002),
            "opt_effective_rank_share_before": at(0.8, 0.7, 0.6),
            "opt_effective_rank_share_after": at(0.7, 0.6, 0.5),
            "opt_turn": at(0.1, 0.2, 0.3),
            "hessian_top": [(10, 10 * scale + seed), (20, 4 * scale + seed), (30, 2 * scale + seed)],
            "hessian_residual": [(10, 0.01), (20, 0.5 if seed == 0 else 0.02), (30, 0.03)],
        }

    return of_seed


ARMS: dict[str, list[Outcome]] = {"muon": [*BASELINE], "nolah": NOLAH}


def diagnosed(**series) -> Standing:
    return made_up(ARMS, series=series)


def test_diagnostics_are_means_over_seeds_at_shared_steps():
    standing = diagnosed(muon=measures(1.0), nolah=measures(0.5))
    found = {(d.arm, d.quantity): d for d in standing.diagnostics}
    turn = found[("nolah", "opt_turn")]
    assert (turn.first_step, turn.last_step, turn.seeds) == (10, 30, [0, 1, 2, 3, 4])
    assert (turn.first, turn.mean, turn.last) == pytest.approx((0.05 + 0.02, 0.1 + 0.02, 0.15 + 0.02))
    assert turn.last_range == pytest.approx((0.15, 0.15 + 0.04))
    shown = table(build(standing, pictures=()), "Diagnostics")
    rows = {(row[0], row[1].split(" [")[0]): row for row in shown.rows}
    assert rows[("nolah", "turn from Muon's own update")][2:] == ("0.0700", "0.120", "0.120", "0.170", "10 to 30", "5")


def test_the_early_mean_is_over_the_first_part_of_the_run_alone():
    late = round(0.3 * STEPS) + 1

    def turning(seed: int) -> dict[str, list[tuple[int, float]]]:
        return {"opt_turn": [(10, 0.2), (late - 1, 0.4), (late, 0.9)], "grad_norm": [(late, 2.0 + seed)]}

    standing = diagnosed(muon=turning, nolah=turning)
    found = {d.quantity: d for d in standing.diagnostics}
    assert found["opt_turn"].early == pytest.approx(0.3)
    assert found["opt_turn"].mean == pytest.approx(0.5)
    assert found["grad_norm"].early is None
    start = next(sentence for sentence in hypotheses(standing) if "too aggressive" in sentence)
    assert "at step 10: nolah 0.200; in the first 30% of the steps: nolah 0.300; on average: nolah 0.500." in start
    shown = table(build(standing, pictures=()), "Diagnostics")
    rows = {(row[0], row[1].split(" [")[0]): row for row in shown.rows}
    assert rows[("nolah", "turn from Muon's own update")][3] == "0.300"
    assert rows[("nolah", "gradient norm, all parameters")][3] == "–"


def test_a_mean_is_never_over_the_runs_that_survived():
    def short(seed: int) -> dict[str, list[tuple[int, float]]]:
        return {"grad_norm": [(10, 1.0), (20, 2.0), (30, 3.0)][: 2 if seed == 2 else 3]}

    (found,) = diagnosed(nolah=short).diagnostics
    assert (found.last_step, found.last, found.mean) == (20, 2.0, 1.5)


def test_an_uncertain_eigenvalue_is_left_out_and_counted():
    standing = diagnosed(muon=measures(1.0), nolah=measures(0.5))
    top = next(d for d in standing.diagnostics if (d.arm, d.quantity) == ("muon", "hessian_top"))
    assert (top.first, top.mean, top.last) == pytest.approx((12, (12 + 4) / 2, 4))  # not step 20
    assert any(
        "left out of the diagnostics: 2 of 30, with a relative residual over 0.1" in note for note in standing.notes
    )


def test_an_eigenvalue_that_was_looked_at_once_is_told_once():
    def once(seed: int) -> dict[str, list[tuple[int, float]]]:
        return {"hessian_top": [(10, 3.0 + seed)], "hessian_residual": [(10, 0.001)]}

    geometry = hypotheses(diagnosed(muon=once, nolah=once))[0]
    assert "Top eigenvalue of the Hessian at step 10: muon 5.00 (seeds 3.00 to 7.00) and nolah 5.00" in geometry
    assert geometry.count("step 10") == 1


def test_each_hypothesis_has_its_sentence_with_the_numbers_of_the_series():
    standing = diagnosed(muon=measures(1.0), nolah=measures(0.5))
    geometry, start, rank, warmup = hypotheses(standing)
    assert geometry.startswith(
        "Is the loss surface another one? Top eigenvalue of the Hessian at step 10: muon 12.0 and nolah 7.00; at step "
        "30: muon 4.00 (seeds 2.00 to 6.00) and nolah 3.00 (seeds 1.00 to 5.00)."
    )
    assert "at step 10: nolah 0.0700; on average: nolah 0.120." in start
    assert "on average: muon 0.620 and nolah 0.320; at step 30: muon 0.520 and nolah 0.270" in rank
    assert "before projection and noise, on average: muon 0.720 and nolah 0.370" in rank
    regress = only(standing).estimates.early_regress
    assert regress is not None
    assert f"It takes 0 of {STEPS} steps in every arm" in warmup
    assert f"Gradient norm at step 10: muon 1.52 and nolah 0.770; at step 30: muon 0.620 and nolah 0.320; largest mean lag in the first 30% of the steps, of the baseline's loss: nolah {percent_of(regress)}." in warmup  # noqa: E501  # fmt: skip
    for sentence in (geometry, start, rank, warmup):
        assert "This describes 5 seeds an arm at this one size and tests nothing" in sentence
        assert not NO_CLAIM.search(sentence)
    assert list(hypotheses(standing)) == [*section(build(standing, pictures=()), "Diagnostics")[0].sentences]


def test_without_series_nothing_is_said():
    standing = made_up(ARMS)
    assert hypotheses(standing) == []
    assert "Diagnostics" not in [s.title for s in build(standing, pictures=("diagnostics",)).sections]
    few = diagnosed(muon=lambda _: {"lr": [(10, 0.1)]}, nolah=lambda _: {"grad_norm": [(10, 2.0)]})
    (warmup,) = hypotheses(few)
    assert warmup.startswith("Is the warmup too short?")


def test_what_is_zero_throughout_has_no_row():
    def zero(seed: int) -> dict[str, list[tuple[int, float]]]:
        return {"opt_turn": [(10, -1.5e-16), (20, 0.0)], "grad_norm": [(10, 2e-6), (20, 1.0)]}

    shown = table(build(diagnosed(muon=zero, nolah=zero), pictures=()), "Diagnostics")
    assert {row[1].split(",")[0] for row in shown.rows} == {"gradient norm"}
    assert shown.rows[0][2] == "2.00e-06"


def test_of_many_arms_a_sentence_names_the_ends():
    arms = {"muon": BASELINE, **{f"a{i:02d}": NOLAH for i in range(8)}}
    series = {arm: measures(1.0 + i / 10) for i, arm in enumerate(arms)}
    standing = made_up(arms, series=series)
    assert table(build(standing, pictures=()), "Diagnostics").collapsed
    assert not table(build(diagnosed(muon=measures(1.0)), pictures=()), "Diagnostics").collapsed
    geometry, *_ = hypotheses(standing)
    assert "at step 10: 12.0 (muon) to 20.0 (a07) over 9 arms" in geometry
    assert "a03" not in geometry


@given(st.floats(-1e9, 1e9))
def test_a_measurement_is_printed_to_three_digits(value):
    assert float(measured(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3, abs=1e-12)


# Order and pictures


def test_the_sections_stand_in_their_order():
    standing = made_up(
        {"muon": BASELINE, "nolah": NOLAH}, samples={"muon": "x", "nolah": "y"}, series={"nolah": measures(1.0)}
    )
    drawn = (
        "finish",
        "diagnostics",
        "early",
        "losses",
        "differences",
        "evidence_below",
        "evidence",
        "forest",
        "unknown",
    )
    document = build(standing, pictures=drawn)
    assert [s.title for s in document.sections] == [
        "Paired differences", "Comparisons", "Reasons", "Evidence as it grew", "Loss curves", "Early stability",
        "Speed to target", "Cost", "Tuning", "Diagnostics", "What the models write", "What was declared", "Every run",
        "Limits of this study", "Provenance",
    ]  # fmt: skip
    placed = [(s.title, block.names) for s in document.sections for block in s.blocks if isinstance(block, Pictures)]
    assert placed == [
        ("Paired differences", ("forest",)),
        ("Evidence as it grew", ("evidence", "evidence_below")),
        ("Loss curves", ("losses", "early", "finish", "differences")),
        ("Diagnostics", ("diagnostics",)),
    ]
    only_two = build(standing, pictures=("losses", "evidence"))
    assert [b.names for s in only_two.sections for b in s.blocks if isinstance(b, Pictures)] == [
        ("evidence",),
        ("losses",),
    ]


def test_every_number_comes_again_from_the_saved_standing():
    standing = diagnosed(muon=measures(1.0), nolah=measures(0.5))
    again = Standing.model_validate_json(standing.model_dump_json())
    assert build(again, pictures=()) == build(standing, pictures=())


def test_results_of_others_without_a_known_diverged_loss_are_compared_where_they_meet():
    standing = made_up({"muon": BASELINE[:1], "k": STRONG[:1]}, provenance="reported")
    run = record("k", 0, STRONG[0], registration=standing.snapshot.records[0].registration)
    sparse = run.model_copy(update={"curve": [p for p in run.curve if p.step in (0, 60, 150, 300)]})
    records = [*(r for r in standing.snapshot.records if r.arm == "muon"), sparse]
    again = only(judge(standing.snapshot.model_copy(update={"records": records}), []))
    assert again.early is not None
    assert again.early.regress_by_seed is not None
    base, ours = (dict(c.curve) for c in standing.cells)
    assert again.early.regress_by_seed[0] == pytest.approx((ours[60] - base[60]) / base[60])
    assert again.curve_steps == [60, 150, 300]
    whole = judge(standing.snapshot.model_copy(update={"records": records}), [])
    document = build(whole, pictures=())
    assert "The evaluations that are compared are 60 to 150 steps apart" in prose(document, "Speed to target")
    assert "seed" not in column(table(document, "Early stability"), "largest of any seed")["k"]
