"""A verb's line `dvc exp run -S ...`, put through DVC's own overrides, makes the cell that was asked for."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from muonlab.cli import main
from muonlab.pipeline.resolve import load_params, resolve_optimizer, resolve_settings
from muonlab.registry.cell import OptimizerSpec
from muonlab.registry.settings import Params

PROJECT = Path(__file__).parents[2]
STUDIES = ("001-nolah-vs-muon-tiny", "002-nolah-parts-tiny", "003-hypotheses-tiny", "004-hypotheses-smollm2")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --ngpus finds is the same on every machine: no device is what -1 names."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(PROJECT / name, tmp_path / name)
    for study in STUDIES:
        (tmp_path / "experiments" / study).mkdir(parents=True)
        shutil.copyfile(PROJECT / "experiments" / study / "study.yaml", tmp_path / "experiments" / study / "study.yaml")
    return tmp_path


def verb(folder: Path, line: str) -> Result:
    with contextlib.chdir(folder):
        return CliRunner().invoke(main, [*shlex.split(line), "--dry-run"])


def after(folder: Path, line: str) -> Params:
    """params.yaml as dvc leaves it when it runs the line that the verb prints."""
    from dvc.utils.hydra import apply_overrides

    said = verb(folder, line)
    assert said.exit_code == 0, said.output
    words = shlex.split(said.stdout)
    assert words[:3] == ["dvc", "exp", "run"]
    assert words[3::2] == ["-S"] * len(words[4::2])
    apply_overrides(str(folder / "params.yaml"), words[4::2])
    return load_params(folder / "params.yaml")


def chosen(params: Params) -> OptimizerSpec:
    return resolve_optimizer(params, params.workload, params.optimizer)


@pytest.mark.parametrize(
    ("line", "kind", "options"),
    [
        ("baseline", "muon", {}),
        ("nolah --gate relu --scale 0.95", "nolah", {"gate": "relu", "scale": 0.95}),
        ("nolah --workload tiny-diagnosed", "nolah", {"gate": "tanh", "scale": 0.9}),
        ("pretrain", "muon", {}),
        ("pretrain --nolah", "nolah", {"gate": "tanh", "scale": 0.9}),
        ("pretrain --orthonoise --alpha 1e-5 --no-anneal", "orthonoise", {"alpha": 1e-5, "schedule": "constant"}),
        ("pretrain --isotropic --no-adaptive", "isotropic", {"trigger": "always", "schedule": "exponential"}),
        ("pretrain --orthonoise --rank-threshold 0.3", "orthonoise", {"rank_threshold": 0.3, "trigger": "rank"}),
    ],
)
def test_the_line_makes_the_cell_and_changes_no_other_optimizer(
    folder: Path, line: str, kind: str, options: dict[str, object]
) -> None:
    before = load_params(folder / "params.yaml")
    params = after(folder, f"{line} --seed 7")
    assert (params.seed, params.optimizer, chosen(params).kind) == (7, kind, kind)
    assert {key: chosen(params).options[key] for key in options} == options
    unset = resolve_optimizer(before, params.workload, kind).options
    assert {k: v for k, v in chosen(params).options.items() if k not in options} == {
        k: v for k, v in unset.items() if k not in options
    }
    assert {k: v for k, v in params.optimizers.items() if k != kind} == {
        k: v for k, v in before.optimizers.items() if k != kind
    }
    assert {name: w.settings for name, w in params.workloads.items()} == {
        name: w.settings for name, w in before.workloads.items()
    }


@pytest.mark.parametrize(
    ("steps", "warmup", "every"), [(500, 30, 30), (31, 30, 30), (30, 3, 30), (10, 1, 10), (1, 0, 1)]
)
def test_few_steps_shorten_warmup_and_evaluations_and_enough_leave_them(
    folder: Path, steps: int, warmup: int, every: int
) -> None:
    settings = after(folder, f"baseline --steps {steps}").workloads["tiny"].settings
    assert (settings.steps, settings.warmup_steps, settings.eval_every) == (steps, warmup, every)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pretrain --ngpus 4", ["--ngpus: found 4", "torch reaches 0 GPUs here", "--gloo"]),
        ("pretrain --ngpus 3 --gloo", ["batch_size is 4, which 3 processes do not divide"]),
        ("pretrain --gloo", ["--ngpus 2 or more"]),
        ("pretrain --alpha 0.1", ["muon adds none", "--orthonoise or --isotropic"]),
        ("pretrain --nolah --no-anneal", ["nolah adds none"]),
        ("pretrain --orthonoise --no-adaptive --rank-threshold 0.3", ["keep one"]),
        ("pretrain --orthonoise --alpha -1", ["'alpha' is -1.0"]),
        ("nolah --gate tan", ["'gate' is 'tan'", "Did you mean 'tanh'?"]),
        ("baseline --workload tyny", ["--workload", "'tyny'", "Did you mean 'tiny'?"]),
    ],
)
def test_what_cannot_run_is_refused_before_dvc_writes_it(folder: Path, line: str, words: list[str]) -> None:
    before = (folder / "params.yaml").read_bytes()
    said = verb(folder, line)
    assert said.exit_code == 2
    assert said.stdout == ""
    assert len(said.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in said.stderr
    assert (folder / "params.yaml").read_bytes() == before


def test_the_line_of_several_processes_says_so_in_the_environment_and_makes_the_same_cell(folder: Path) -> None:
    alone, four = verb(folder, "pretrain --seed 7"), verb(folder, "pretrain --seed 7 --ngpus 4 --gloo")
    assert four.exit_code == 0, four.output
    assert four.stdout == f"MUONLAB_RANKS=4 CUDA_VISIBLE_DEVICES='' {alone.stdout}"


@pytest.mark.parametrize(
    ("workload", "study"),
    [
        ("tiny", "001-nolah-vs-muon-tiny"),
        ("smollm2-135m", "004-hypotheses-smollm2"),
        ("tiny-diagnosed", "002-nolah-parts-tiny"),
        ("granite-1b", "001-nolah-vs-muon-tiny"),
    ],
)
def test_a_run_is_reported_by_a_study_on_its_workload_where_there_is_one(
    workload: str, study: str, folder: Path
) -> None:
    assert after(folder, f"baseline --workload {workload}").study == study


def test_values_left_by_an_earlier_run_are_named(folder: Path) -> None:
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=n@e", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    assert "otherwise" not in verb(folder, "nolah").stderr
    after(folder, "nolah --scale 0.5 --steps 100")
    assert "otherwise" not in verb(folder, "nolah --scale 0.5 --steps 100").stderr
    left = verb(folder, "nolah --scale 0.7").stderr
    assert "workloads.tiny.settings.steps;" in left
    assert "scale" not in left
    assert "optimizers.nolah.scale, workloads.tiny.settings.steps;" in verb(folder, "nolah").stderr


@pytest.mark.parametrize(
    ("steps", "batch", "examples", "warmup"), [(20, 4, 1000, 2), (100, 8, 10000, 50), (1000, 16, 100000, 50)]
)
def test_batch_and_examples_follow_the_steps_where_the_workload_says_so(
    folder: Path, steps: int, batch: int, examples: int, warmup: int
) -> None:
    line = f"nolah --gate relu --scale 0.95 --workload granite-350m --steps {steps}"
    settings = after(folder, line).workloads["granite-350m"].settings
    assert (settings.batch_size, settings.examples, settings.warmup_steps) == (batch, examples, warmup)
    said = verb(folder, line)
    assert "batch_size" not in said.stdout
    assert f"{steps} steps of {batch} x 512 tokens, on {examples:,} examples" in said.stderr
    assert "by run length" not in verb(folder, f"nolah --workload tiny --steps {steps}").stderr


def test_what_follows_from_left_steps_is_not_named_beside_them(folder: Path) -> None:
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=n@e", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    after(folder, "nolah --workload granite-350m --steps 1000")
    assert "too: workloads.granite-350m.settings.steps;" in verb(folder, "nolah --workload granite-350m").stderr


def test_few_steps_shorten_an_optimizers_own_warmup_and_the_hessians_steps(folder: Path) -> None:
    path = folder / "params.yaml"
    path.write_text(
        path.read_text().replace("  nolah:\n    kind: nolah\n", "  nolah:\n    kind: nolah\n    warmup_steps: 100\n")
    )
    params = after(folder, "nolah --workload tiny-diagnosed --steps 60")
    assert resolve_settings(params, "tiny-diagnosed", "nolah").warmup_steps == 20
    assert params.workloads["tiny-diagnosed"].settings.hessian_steps == [1, 30]
    assert params.workloads["tiny-diagnosed"].settings.warmup_steps == 30
