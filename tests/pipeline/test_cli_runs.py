"""What trains is seen while it trains, and its curve is followed to its end, whatever end that is."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import STUDY, TOY_PARAMS, TOY_STUDY, Maker, Repository

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.running import find_log, running, tell_log
from muonlab.pipeline.studies import status_of
from muonlab.registry.errors import UsageError

pytestmark = pytest.mark.slow

STEPS = 100_000
TRAIN = f"""
import sys
from muonlab.pipeline.declare import purpose_of
from muonlab.pipeline.attempts import train_cell
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, resolve_cell
layout = Layout.find()
params = load_params(layout.params)
write_fingerprints(layout, params)
cell = resolve_cell(layout, params, "toy", sys.argv[1], 0)
train_cell(layout, cell, purpose_of(layout, cell, {STUDY!r}), data_dir=layout.data("toy"))
"""


@pytest.fixture(scope="module")
def endless(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A paid study whose runs do not end while a test waits."""
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["toy"]["settings"] |= {"steps": STEPS, "eval_every": 2, "checkpoint_every": STEPS}
    study = {**copy.deepcopy(TOY_STUDY), "price_usd_per_gpu_hour": 2.8, "budget_usd": 5}
    return make(tmp_path_factory.mktemp("runs") / "repository", params=params, study=study)


@contextmanager
def training(repository: Repository, arm: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, arm], cwd=repository.root, env=repository.environment(), stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until_it_steps(layout: Layout) -> None:
    deadline = time.monotonic() + 120
    while not any(cell.step > 0 for cell in running(layout, gpu=False).cells):
        assert time.monotonic() < deadline, "nothing trained"
        time.sleep(0.2)


def states(layout: Layout) -> dict[str, str]:
    """The cells of the study that are not missing; the study is incomplete, whatever trains."""
    status = status_of(layout, STUDY)
    assert status.exit_code == 3
    assert any("in training now" in line for line in status.lines()) == any(c.state == "training" for c in status.cells)
    return {f"{cell.arm}-{cell.seed}": cell.state for cell in status.cells if cell.state != "missing"}


def test_status_and_logs_follow_a_run_to_its_end_even_a_killed_one(endless: Repository) -> None:
    layout = Layout.find(endless.root)
    assert list(running(layout, gpu=False).lines()) == ["Nothing is training on this machine."]
    with pytest.raises(UsageError, match="hold no run"):
        find_log(layout, None)
    with training(endless, "nolah") as process:
        until_it_steps(layout)
        found = running(layout, gpu=True)
        (cell,) = found.cells
        assert (cell.study, cell.arm, cell.seed, cell.steps, cell.pid) == (STUDY, "nolah", 0, STEPS, process.pid)
        assert cell.eta_seconds == pytest.approx((STEPS - cell.step) * cell.seconds / cell.step)
        assert cell.cost_usd == pytest.approx(cell.seconds / 3600 * 2.8)
        assert [(s.study, s.attempts, s.cost_usd) for s in found.studies] == [(STUDY, 0, cell.cost_usd)]
        assert (found.gpu_note is None) == bool(found.gpus)
        said: list[str] = []
        tell_log(find_log(layout, "nolah-0"), tail=2, follow=False, say=said.append)
        assert len(said) == 4  # title, two rows, where it is
        assert said[-1].startswith("training, at step ")
        assert states(layout) == {"nolah-0": "training"}
        follower = subprocess.Popen(
            [sys.executable, "-m", "muonlab.cli", "logs", "--follow", "-n", "1"],
            cwd=endless.root, env=endless.environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert follower.stdout is not None
        lines = [follower.stdout.readline() for _ in range(4)]
        process.kill()
        rest = follower.stdout.read().splitlines()
        assert follower.wait(timeout=60) == 0
    assert lines[0].startswith(f"{STUDY}/nolah-0, attempt 1")
    steps = [int(line.split()[1]) for line in [*lines[1:], *rest[:-1]]]
    assert steps == list(range(steps[0], steps[-1] + 1, 2))  # every row once
    assert rest[-1].startswith("ended without a word at step ")
    assert running(layout, gpu=False).cells == []
    assert states(layout) == {"nolah-0": "abandoned"}
