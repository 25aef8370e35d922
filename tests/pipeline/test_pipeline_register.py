"""Registering a declaration by hand: its hash in a file, before anything has run."""

from __future__ import annotations

import pytest
from conftest import STUDY, Repository, make_repository

PATH = f"experiments/{STUDY}/registration.json"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return make_repository(tmp_path_factory.mktemp("register") / "repository")


def register(repository: Repository, **decision: object) -> tuple[str, str]:
    """What the command says when these values are declared, on stdout and stderr."""
    repository.edit_yaml(
        f"experiments/{STUDY}/study.yaml", lambda content: content["study"]["decision"].update(decision)
    )
    said = repository.muon("study", "register")
    return said.stdout, said.stderr


def test_it_prints_the_hash_and_the_file_and_does_it_once(repository: Repository) -> None:
    out, err = register(repository)
    held = (repository.root / PATH).read_bytes()
    assert out.splitlines() == [repository.read(PATH)["registration"], PATH]
    assert "registered; commit the file" in err
    again, err = register(repository)
    assert again == out
    assert "nothing was changed" in err
    assert (repository.root / PATH).read_bytes() == held


def test_seeds_of_a_sequential_plan_are_not_part_of_it_and_its_rule_is(repository: Repository) -> None:
    before, _ = register(repository)
    repository.edit_yaml(f"experiments/{STUDY}/study.yaml", lambda content: content["study"].update(seeds=[0, 1, 2]))
    assert register(repository)[0] == before
    after, err = register(repository, alpha=0.04)
    assert after != before
    assert "registered" in err
    assert repository.read(PATH)["declaration"]["study"]["decision"]["alpha"] == 0.04


def test_what_cannot_be_run_is_not_registered(repository: Repository) -> None:
    (repository.root / PATH).unlink(missing_ok=True)
    repository.edit_yaml("params.yaml", lambda content: content["optimizers"]["nolah"].update(scale=0.5))
    refused = repository.muon("study", "register", check=False)
    assert refused.returncode == 2
    assert "'nolah' of 001-toy reads otherwise here than in the last commit" in refused.stderr
    assert not (repository.root / PATH).exists()
    repository.git("checkout", "-q", "HEAD", "params.yaml")
    unknown = repository.muon("study", "register", "001-toi", check=False)
    assert unknown.returncode == 2
    assert "Did you mean '001-toy'?" in unknown.stderr
