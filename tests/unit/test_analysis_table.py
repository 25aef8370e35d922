"""What a CSV of results means, and what is refused: the loss of the last step, duplicates, divergence, statuses."""

import math
import random
import time

import numpy as np
import pytest

from muonlab.analysis.table import read_results
from muonlab.registry.errors import UsageError
from muonlab.stats.guardrails import early_regress

CURVES = {
    ("muon", 0): {50: 3.0, 100: 2.6, 200: 2.2},
    ("muon", 1): {50: 3.1, 100: 2.7, 200: 2.3},
    ("nolah", 0): {50: 3.2, 100: 2.5, 200: 2.1},
    ("nolah", 1): {50: 3.3, 100: 2.6, 200: 2.25},
}
ROWS = [f"{arm},{seed},{step},{loss}" for (arm, seed), curve in CURVES.items() for step, loss in curve.items()]


@pytest.fixture
def read(tmp_path):
    def read(text, columns=None, **given):
        path = tmp_path / "results.csv"
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text, encoding="utf-8")
        return read_results(path, columns, **given)

    return read


def csv(*rows, header="arm,seed,loss"):
    return "\n".join([header, *rows]) + "\n"


def finals(results):
    return {(arm, seed): e.run.loss for arm in results.arms for seed, e in results.of(arm).items()}


def test_a_runs_loss_is_its_last_steps_in_whatever_order_the_rows_come(read):
    expected = {key: curve[200] for key, curve in CURVES.items()}
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for rows in (ROWS, ROWS[::-1], shuffled):
        results = read(csv(*rows, header="arm,seed,step,loss"))
        assert finals(results) == expected
        curve = results.curves("nolah")[1]
        assert list(curve.steps) == [50, 100, 200]
        assert list(curve.losses) == [3.3, 2.6, 2.25]


def test_one_row_a_run(read):
    results = read(csv("muon,0,2.2", "nolah,0,2.1", "muon,1,2.3"))
    assert results.arms == ("muon", "nolah")
    assert results.curves("muon") == {}
    sample = results.paired("muon", "nolah")
    assert [(run.seed, run.loss) for run in sample.baseline] == [(0, 2.2), (1, 2.3)]
    assert sample.early_regress is None


def test_columns_are_renamed_and_others_left_alone(read):
    text = csv("x,muon,0,2.2,FINISHED", header="Name,optimizer,config.seed,val/loss,State")
    columns = {"arm": "optimizer", "seed": "config.seed", "loss": "val/loss", "status": "State"}
    assert finals(read(text, columns)) == {("muon", 0): 2.2}


def test_a_spreadsheets_byte_order_mark_quotes_and_float_seeds_are_read(read):
    text = '\ufeffarm,seed,loss\r\n"muon, tuned",0.0,"2.2"\r\n\r\nnolah,1.0,2.1\r\n'
    assert finals(read(text.encode())) == {("muon, tuned", 0): 2.2, ("nolah", 1): 2.1}


def test_rows_that_agree_are_one_row(read):
    assert finals(read(csv("muon,0,2.2", "muon,0,2.20", "nolah,0,2.1"))) == {("muon", 0): 2.2, ("nolah", 0): 2.1}
    twice = read(csv(*ROWS, *ROWS, header="arm,seed,step,loss"))
    assert finals(twice) == finals(read(csv(*ROWS, header="arm,seed,step,loss")))


def test_a_trackers_rows_without_a_loss_are_passed_over_but_not_at_the_end(read):
    history = ["muon,0,0,3.0", "muon,0,1,", "muon,0,2,2.5", "muon,0,2,", "muon,0,,"]
    results = read(csv(*history, header="arm,seed,step,loss"))
    assert finals(results) == {("muon", 0): 2.5}
    assert list(results.curves("muon")[0].steps) == [0, 2]
    # pandas writes nan as an empty cell: taking the last finite loss instead would hide a divergence.
    with pytest.raises(UsageError, match="line 4: arm 'muon', seed 0 ends without a loss"):
        read(csv("muon,0,0,3.0", "muon,0,2,2.5", "muon,0,3,", header="arm,seed,step,loss"))


def test_cost_and_seconds_are_the_last_steps(read):
    rows = ["muon,0,1,3.0,0.5,10", "muon,0,2,2.5,1.5,30"]
    entry = read(csv(*rows, header="arm,seed,step,loss,cost_usd,seconds")).of("muon")[0]
    assert (entry.cost_usd, entry.seconds) == (1.5, 30)


@pytest.mark.parametrize(
    "losses", [["3.0", "nan"], ["3.0", "nan", "2.5"], ["2.0", "inf", "2.0"], ["2.0", "3.1", "3.2"]]
)
def test_a_divergence_is_kept_with_a_diverged_loss_and_refused_without(read, losses):
    text = csv(*(f"muon,0,{i},{loss},finished" for i, loss in enumerate(losses)), header="arm,seed,step,loss,status")
    with pytest.raises(UsageError, match=r"arm 'muon', seed 0 diverged .*--diverged-loss"):
        read(text)
    run = read(text, diverged_loss=7.6).of("muon")[0].run
    assert (run.status, run.loss) == ("diverged", None)


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("completed", "completed"),
        ("FINISHED", "completed"),
        ("crashed", "failed"),
        ("Killed", "failed"),
        ("failed", "failed"),
    ],
)
def test_statuses_of_trackers(read, word, status):
    run = read(csv(f"muon,0,2.2,{word}", header="arm,seed,loss,status")).of("muon")[0].run
    assert run.status == status


@pytest.mark.parametrize("word", ["crashed", "killed", "failed", "abandoned"])
@pytest.mark.parametrize("losses", [["nan"], ["3.0", "nan"], ["3.0", "inf", ""], ["2.0", "3.1", "3.2"]])
def test_a_job_that_was_ended_because_its_run_diverged_is_a_divergence(read, word, losses):
    text = csv(*(f"muon,0,{i},{loss},{word}" for i, loss in enumerate(losses)), header="arm,seed,step,loss,status")
    with pytest.raises(UsageError, match="--diverged-loss"):
        read(text)
    assert read(text, diverged_loss=7.6).of("muon")[0].run.status == "diverged"


@pytest.mark.parametrize("losses", [["2.2"], [""], ["3.0", "2.5"], ["2.0", "3.1"]])
def test_a_job_that_was_ended_without_a_divergence_stays_failed(read, losses):
    text = csv(*(f"muon,0,{i},{loss},crashed" for i, loss in enumerate(losses)), header="arm,seed,step,loss,status")
    assert read(text).of("muon")[0].run.status == "failed"


def test_early_regress_of_unlike_lengths_is_over_those_of_the_shortest_that_completed(read):
    rows = [row for row in ROWS if not row.startswith("nolah,1,200")]
    rows += [f"{arm},{seed},20,{3.4 + 0.3 * (arm == 'nolah')}" for arm in ("muon", "nolah") for seed in (0, 1)]
    found = read(csv(*rows, header="arm,seed,step,loss")).paired("muon", "nolah")
    assert found.early_regress == pytest.approx(0.3 / 3.4)  # step 20 alone is within 30 % of 100
    other_grid = [row.replace("nolah,0,20,", "nolah,0,21,") for row in rows]
    assert read(csv(*other_grid, header="arm,seed,step,loss")).paired("muon", "nolah").early_regress is None


def test_pairs_of_other_lengths_side_by_side_have_an_early_regress(read):
    short = [row for row in ROWS if ",0,200" not in row]
    rows = [
        *short,
        "muon,0,20,3.4",
        "nolah,0,20,3.4",
        "muon,1,20,3.4",
        "nolah,1,20,3.4",
        "muon,1,900,2",
        "nolah,1,900,2",
    ]
    assert read(csv(*rows, header="arm,seed,step,loss")).paired("muon", "nolah").early_regress == 0


def test_a_failed_run_needs_no_loss_and_is_not_a_common_seed(read):
    text = csv("muon,0,2.2,completed", "nolah,0,,failed", "muon,1,2.1,", "nolah,1,2.0,", header="arm,seed,loss,status")
    assert read(text).common_seeds("muon", "nolah") == [1]


def test_early_regress_is_that_of_the_pairs_on_common_steps(read):
    early = {(arm, seed, step): loss for (arm, seed), curve in CURVES.items() for step, loss in curve.items()}
    rows = [*ROWS, "muon,0,20,3.4"]  # a step that one run alone has
    found = read(csv(*rows, header="arm,seed,step,loss")).paired("muon", "nolah").early_regress
    base, chal = ([[early[arm, seed, step] for step in (50, 100, 200)] for seed in (0, 1)] for arm in ("muon", "nolah"))
    assert found == early_regress([50, 100, 200], base, chal, total_steps=200)
    assert found > 0.06


def test_a_diverged_runs_missing_tail_counts_with_the_diverged_loss(read):
    rows = ["muon,0,25,3", "muon,0,50,2.8", "muon,0,200,2.2", "nolah,0,25,nan"]
    found = read(csv(*rows, header="arm,seed,step,loss"), diverged_loss=7.0).paired("muon", "nolah")
    assert found.early_regress == pytest.approx((7 - 2.8) / 2.8)
    assert found.integrity_failures == ()


def test_curves_of_different_length_are_not_a_pair(read):
    rows = [row for row in ROWS if not row.startswith("nolah,1,200")]
    sample = read(csv(*rows, header="arm,seed,step,loss")).paired("muon", "nolah")
    (failure,) = sample.integrity_failures
    assert failure.startswith("seed 1: muon ends at step 200 and nolah at step 100")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("arm,seed,loss\n", "a header and no rows"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not a CSV file"),
        ("arm,seed,loss\nmuon,0,2\n".encode("utf-16"), "not a CSV file"),
        ("arm,seed,loss\nmuon,0,2\x00\n", "not a CSV file"),
        ("arm,seed,val_loss\nmuon,0,2\n", r"no column 'loss' among .* Did you mean 'val_loss'\?"),
        ("arm;seed;loss\nmuon;0;2\n", "separated by ';'"),
        ("arm,seed,loss,loss\nmuon,0,2,2\n", "2 times"),
        (csv("muon,0,2.1", "muon,1"), "line 3: 2 fields where the header has 3"),
        (csv("muon,0,2.1", "muon,1,2.2a"), "line 3: the loss is '2.2a'"),
        (csv("muon,0,-2"), "line 2: the loss is -2"),
        (csv("muon,x,2"), "line 2: the seed is 'x'"),
        (csv("muon,1.5,2"), "line 2: the seed is '1.5'"),
        (csv("muon,-1,2"), "line 2: the seed is '-1'"),
        (csv(",0,2"), "line 2: the arm is empty"),
        (csv("muon,0,2.1", "muon,0,2.2"), "line 3: .* has loss 2.2 here and 2.1 in line 2"),
        (csv("muon,0,2.1", "muon,0,"), None),
        (csv("muon,0,"), "ends without a loss"),
        (csv("muon,0,5,2.1", "muon,0,5,2.2", header="arm,seed,step,loss"), "at step 5 has loss 2.2 here and 2.1"),
        (csv("muon,0,,2.1", header="arm,seed,step,loss"), "a loss without a step"),
        (csv("muon,0,x,2.1", header="arm,seed,step,loss"), "step is 'x'"),
        (csv("muon,0,2,complted", header="arm,seed,loss,status"), r"unknown status 'complted'.* mean 'completed'\?"),
        (csv("muon,0,2,RUNNING", header="arm,seed,loss,status"), "unknown status 'RUNNING'"),
        (csv("muon,0,2,failed", "muon,0,2,completed", header="arm,seed,loss,status"), "keep one status"),
        (csv("muon,0,2,free", header="arm,seed,loss,cost_usd"), "cost_usd is 'free'"),
    ],
)
def test_refusals_are_one_sentence_that_names_the_place(read, text, said):
    if said is None:
        read(text)
        return
    with pytest.raises(UsageError, match=said) as refused:
        read(text)
    assert "results.csv" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_columns_that_do_not_exist_are_refused_with_the_nearest(read, tmp_path):
    with pytest.raises(UsageError, match=r"unknown column 'los'.* mean 'loss'\?"):
        read(csv("muon,0,2"), {"los": "x"})
    with pytest.raises(UsageError, match=r"no column 'stp' among .*--column step=NAME"):
        read(csv("muon,0,1,2", header="arm,seed,step,loss"), {"step": "stp"})
    with pytest.raises(UsageError, match="no such file"):
        read_results(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match=r"unknown arm 'moun'.* mean 'muon'\?"):
        read(csv("muon,0,2")).of("moun")


def test_twenty_thousand_rows_are_read_in_under_two_seconds(read):
    rng = np.random.default_rng(0)
    rows = [
        f"arm{arm},{seed},{step},{2 + math.exp(-step / 500) + 1e-3 * rng.random():.6f}"
        for arm in range(10)
        for seed in range(10)
        for step in range(0, 2000, 10)
    ]
    text = csv(*rows, header="arm,seed,step,loss")
    start = time.process_time()
    results = read(text)
    assert time.process_time() - start < 2
    assert len(rows) == 20_000
    assert len(results.curves("arm3")[3].steps) == 200
