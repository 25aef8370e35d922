"""Wrong input is refused in one sentence, with the right exit code, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import STUDY, TOY_PARAMS, Repository, make_repository

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return make_repository(tmp_path_factory.mktemp("refusals") / "repository")


def set_to(*path: str, value: object) -> Change:
    def change(content: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = value

    return change


PARAMS: dict[str, tuple[Change, list[str]]] = {
    "optimizer": (set_to("optimizer", value="nola"), ["params.yaml: optimizer", "'nola'", "muon, nolah", "'nolah'"]),
    "workload": (set_to("workload", value="tyny"), ["params.yaml: workload", "'tyny'", "toy"]),
    "key": (set_to("optimizers", "nolah", "scail", value=1), ["'scail'", "Did you mean 'scale'?"]),
    "kind": (set_to("optimizers", "nolah", "kind", value="nolha"), ["optimizers.nolah.kind", "'nolha'", "'nolah'"]),
    "type": (set_to("optimizers", "nolah", "scale", value="big"), ["optimizers.nolah", "'scale'", "'big'"]),
    "range": (set_to("workloads", "toy", "tuned", "nolah", "lr", value=-1), ["'lr'", "-1", "greater than 0"]),
    "seed": (set_to("seed", value=-1), ["params.yaml", "seed", "-1", "greater than or equal to 0"]),
    "seed type": (set_to("seed", value="three"), ["seed", "'three'", "integer"]),
    "steps": (set_to("workloads", "toy", "settings", "steps", value=0), ["settings.steps", "0", "greater than 0"]),
    "untuned": (set_to("workloads", "toy", "tuned", value={}), ["no learning rate on 'toy'", "tuned.muon"]),
    "twice": (set_to("optimizers", "nolah", "lr", value=0.1), ["'lr' stands in optimizers.nolah and in"]),
    "unknown top": (set_to("optimiser", value="muon"), ["unknown key 'optimiser'", "'optimizer'"]),
}

DECLARATION: dict[str, tuple[Change, list[str]]] = {
    "empty seeds": (set_to("study", "seeds", value=[]), ["study.seeds", "at least 1"]),
    "seed -1": (set_to("study", "seeds", value=[-1]), ["study.seeds.0", "-1"]),
    "arm twice": (set_to("study", "challengers", value=["nolah", "nolah"]), ["'nolah' is named 2 times"]),
    "no such baseline": (set_to("study", "baseline", value="sgd"), ["study.baseline", "'sgd'", "muon, nolah"]),
    "no such arm": (set_to("study", "challengers", value=["nolar"]), ["study.challenger", "'nolar'", "'nolah'"]),
    "no such workload": (set_to("study", "workload", value="tiny"), ["study.workload", "'tiny'", "toy"]),
    "no min_effect": (set_to("study", "decision", value={}), ["study.decision.min_effect", "missing"]),
    "unknown key": (set_to("study", "seedz", value=[0]), ["unknown key 'study.seedz'", "'seeds'"]),
    "other slug": (set_to("study", "slug", value="002"), ["slug is '002'", "folder is '001-toy'"]),
}


def refuses(repository: Repository, path: str, change: Change, words: list[str]) -> None:
    """With the change in the file, `muon` says these words in one line, exits with 2 and writes nothing."""
    repository.edit_yaml(path, change)
    try:
        before = repository.changed()
        done = repository.muon("study", "run", STUDY, check=False)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        for word in words:
            assert word in done.stderr
        assert repository.changed() == before
    finally:
        repository.git("checkout", "-q", "HEAD", path)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_muon_refuses_wrong_parameters(repository: Repository, name: str) -> None:
    refuses(repository, "params.yaml", *PARAMS[name])


@pytest.mark.parametrize("name", sorted(DECLARATION))
def test_muon_refuses_wrong_declarations(repository: Repository, name: str) -> None:
    refuses(repository, f"experiments/{STUDY}/study.yaml", *DECLARATION[name])


def test_muon_names_the_nearest_study_and_command(repository: Repository) -> None:
    done = repository.muon("study", "run", "001-toi", check=False)
    assert done.returncode == 2
    assert "Did you mean '001-toy'?" in done.stderr
    done = repository.muon("studi", check=False)
    assert done.returncode == 2
    assert "Did you mean 'study'?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer=nola", ["params.yaml: optimizer", "'nola'", "Did you mean 'nolah'?"]),
        ("seed=-1", ["seed", "-1", "greater than or equal to 0"]),
        ("workloads.toy.settings.steps=0", ["settings.steps", "greater than 0"]),
        ("optimizers.nolah.scale=big", ["'scale'", "'big'"]),
        ("optimizers.nolah.scail=1", ["'scail'", "'scale'"]),
    ],
)
def test_dvc_exp_run_refuses_with_the_same_sentence(repository: Repository, override: str, words: list[str]) -> None:
    try:
        # `+` adds a key that is not there, as a mistyped one is not.
        flag = f"+{override}" if "scail" in override else override
        done = repository.dvc("exp", "run", "-S", flag, check=False)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        for word in words:
            assert word in said
        assert not (repository.root / "runs/exp/current/train.json").exists()
        assert not (repository.root / "data/toy").exists()
        assert not repository.attempts()
    finally:
        # DVC leaves an index entry that hides an edit of the same size: git must be made to write the file anew.
        (repository.root / "params.yaml").unlink()
        repository.git("checkout", "-q", "HEAD", "params.yaml")


@pytest.mark.slow
def test_a_run_that_no_study_could_report_on_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """Another workload than that of the study in params.yaml, in a clone that never prepared the study's data."""
    params = copy.deepcopy(TOY_PARAMS)
    params["workloads"]["other"] = copy.deepcopy(params["workloads"]["toy"])
    repository = make_repository(tmp_path / "repository", params=params)
    done = repository.dvc("exp", "run", "-S", "workload=other", check=False)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "study '001-toy' is to report on this run of 'other', and its own data, of workload 'toy', is not" in said
    assert "prepare that first (`dvc repro data/dvc.yaml:prepare_data@toy`)" in said
    assert not repository.attempts()
    repository.dvc("repro", "data/dvc.yaml:prepare_data@toy")
    repository.dvc("exp", "run")
    assert len(repository.attempts()) == 1


def test_the_stage_itself_refuses_a_wrong_command_line(repository: Repository) -> None:
    done = repository.run("python", "-m", "stages.train", "toy", "muon", check=False)
    assert done.returncode == 2
    assert "found 2 arguments; expected WORKLOAD OPTIMIZER SEED" in done.stderr


def test_help_takes_no_heavy_imports(repository: Repository) -> None:
    """`muon --help` must answer at once: nothing that takes a second to import may be loaded for it."""
    code = (
        "import sys; import muonlab.cli\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'dvc', 'pandas', 'scipy', 'matplotlib', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert repository.run("python", "-c", code).stdout.strip() == "[]"
