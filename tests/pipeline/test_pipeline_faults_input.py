"""Declarations that are weapons: bombs, loops, huge files, paths as names. One sentence, exit 2, nothing written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import STUDY, Repository, make_repository
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_study
from muonlab.registry.errors import UsageError
from muonlab.registry.settings import Name

BOMB = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
"""9^11 strings, once its aliases are followed."""

FILES = {
    "bomb": (BOMB, "aliases are not allowed"),
    "loop": ("study: &s\n  slug: *s\n", "aliases are not allowed"),
    "deep": ("study: " + "[" * 100_000 + "\n", "not valid YAML"),
    "code": ("study: !!python/object/apply:os.mkdir [ran]\n", "could not determine a constructor"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return make_repository(tmp_path_factory.mktemp("weapons") / "repository")


def refused(repository: Repository, path: str, word: str) -> None:
    """`muon study run` says one sentence that names the file, within 1 GB of address space, and writes nothing."""
    before = repository.changed()
    done = repository.run(
        "prlimit", f"--as={1 << 30}", sys.executable, "-m", "muonlab.cli", "study", "run", STUDY, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert path in done.stderr
    assert word in done.stderr
    assert repository.changed() == before
    assert not (repository.root / "ran").exists()


@pytest.mark.parametrize("path", ["params.yaml", f"experiments/{STUDY}/study.yaml"])
@pytest.mark.parametrize("weapon", sorted(FILES))
def test_a_declaration_that_is_a_weapon_is_refused(repository: Repository, path: str, weapon: str) -> None:
    text, word = FILES[weapon]
    file = repository.root / path
    held = file.read_text()
    try:
        file.write_text(text)
        refused(repository, path, word)
    finally:
        file.write_text(held)


def test_a_file_of_100_megabytes_is_not_read(repository: Repository) -> None:
    file = repository.root / "params.yaml"
    held = file.read_text()
    try:
        os.truncate(file, 100_000_000)
        refused(repository, "params.yaml", "100000000 bytes; a declaration has at most 1000000")
    finally:
        file.write_text(held)


NEW = [
    "new",
    "--baseline",
    "muon",
    "--challenger",
    "nolah",
    "--question",
    "?",
    "--min-effect",
    "1%",
    "--workload",
    "toy",
]


@pytest.mark.parametrize("name", ["../001-toy", "/etc/passwd", "..", "001-toy\n"])
@pytest.mark.parametrize("command", [["run"], NEW], ids=["run", "new"])
def test_a_study_that_is_a_path_is_refused(repository: Repository, command: list[str], name: str) -> None:
    before = everything_beside(repository)
    done = repository.muon("study", *command, "--", name, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert everything_beside(repository) == before


def everything_beside(repository: Repository) -> list[Path]:
    """All files of the repository and of the folder around it, but git's and what Python compiles for itself."""
    return sorted(path for path in repository.root.parent.rglob("*") if not {".git", "__pycache__"} & {*path.parts})


@given(name=st.text(max_size=80) | st.from_regex(r"[a-z0-9./_\\-]{1,70}", fullmatch=True))
def test_a_name_is_a_file_name_or_no_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        return
    assert Path(name).name == name
    assert name == name.lower().strip(" .")
    assert 1 <= len(name) <= 64
    assert name.isascii()


@given(slug=st.text(max_size=80) | st.sampled_from(["..", "../..", "001-toy/.", "./001-toy", "001-TOY"]))
def test_only_a_declared_study_is_loaded(repository: Repository, slug: str) -> None:
    if slug != STUDY:
        with pytest.raises(UsageError):
            load_study(Layout.find(repository.root), slug)
