"""Git merges what two clones made, by the driver that .gitattributes names; of declarations it decides nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from muonlab.pipeline import merging
from muonlab.pipeline.doors import HIDE_ALL, open_studies
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.sharing import is_shared

PROJECT = Path(__file__).parents[2]
REGISTRATION = "experiments/s/registration.json"
LOCK = "experiments/s/dvc.lock"


class Clones:
    """A repository with two branches that begin alike."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--initial-branch=main")
        shutil.copyfile(PROJECT / ".gitattributes", root / ".gitattributes")
        self.commit({})
        self.git("branch", "theirs")

    def git(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=self.root, check=check, capture_output=True, text=True)

    def commit(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "--all")
        self.git("commit", "-m", "x", "--allow-empty")

    def merged(self, ours: dict[str, str], theirs: dict[str, str]) -> tuple[int, str]:
        """Commit both sides and merge the second into the first; return git's exit code and what was said."""
        self.commit(ours)
        self.git("switch", "theirs")
        self.commit(theirs)
        self.git("switch", "main")
        done = self.git("merge", "-m", "both", "theirs", check=False)
        return done.returncode, done.stdout + done.stderr

    def read(self, name: str) -> str:
        return (self.root / name).read_text()


@pytest.fixture
def clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clones:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    made = Clones(tmp_path)
    merging.set_up(tmp_path)
    return made


def lock(**stages: str) -> str:
    return yaml.safe_dump({"schema": "2.0", "stages": {name: {"cmd": cmd} for name, cmd in stages.items()}})


def registration(at: str, *, declared: int = 0, overrides: tuple[str, ...] = ()) -> str:
    content: dict[str, Any] = {
        "registration": f"hash {declared}",
        "registered_at": at,
        "commit": f"commit of {at}",
        "declaration": {"study": {"declared": declared}},
        "overrides": [{"at": when, "gates": ["one is closed"]} for when in overrides],
    }
    return json.dumps(content, indent=2) + "\n"


def test_locks_are_merged_stage_by_stage_and_reports_are_ours(clones: Clones) -> None:
    code, said = clones.merged(
        {LOCK: lock(a="ours", both="ours"), "reports/s/verdict.json": "ours", "reports/s/figures/f.svg": "ours"},
        {
            LOCK: lock(b="theirs", both="theirs"),
            "reports/s/verdict.json": "theirs",
            "reports/s/figures/f.svg": "theirs",
        },
    )
    assert code == 0
    stages = {name: stage["cmd"] for name, stage in yaml.safe_load(clones.read(LOCK))["stages"].items()}
    assert stages == {"a": "ours", "b": "theirs", "both": "ours"}
    assert [clones.read(f"reports/s/{name}") for name in ("verdict.json", "figures/f.svg")] == ["ours", "ours"]
    assert said.count("reports/s: ours is kept; `muon study run s` makes it of the runs of both sides") == 1


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_earlier_registration_stands_with_the_overrides_of_both(clones: Clones, first: str) -> None:
    early = registration("2026-01-01", overrides=("2026-01-02",))
    late = registration("2026-01-03", overrides=("2026-01-04",))
    sides = ({REGISTRATION: early}, {REGISTRATION: late})
    code, _ = clones.merged(*(sides if first == "ours" else reversed(sides)))
    assert code == 0
    both = ("2026-01-02", "2026-01-04")
    assert clones.read(REGISTRATION) == registration("2026-01-01", overrides=both)


def test_of_two_declarations_none_is_chosen(clones: Clones) -> None:
    code, said = clones.merged(
        {REGISTRATION: registration("2026-01-01", declared=1)}, {REGISTRATION: registration("2026-01-03", declared=2)}
    )
    assert code == 1
    assert f"CONFLICT (add/add): Merge conflict in {REGISTRATION}" in said
    assert "<<<<<<<" in clones.read(REGISTRATION)


def test_a_file_that_is_no_lock_is_merged_as_text(clones: Clones) -> None:
    code, _ = clones.merged({LOCK: "stages: [broken\n"}, {LOCK: lock(b="theirs")})
    assert code == 1
    assert "<<<<<<<" in clones.read(LOCK)


def test_a_clone_is_set_up_by_the_command_that_doctor_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert not merging.is_set_up(tmp_path)
    subprocess.run([sys.executable, "-m", "muonlab.pipeline.merging"], cwd=tmp_path, check=True)
    assert merging.is_set_up(tmp_path)


def test_studies_that_either_side_has_opened_to_dvc_are_open(clones: Clones) -> None:
    """`muon commit` takes the file, which two clones that ran different studies have changed in the same place."""
    assert is_shared(".dvcignore")

    def opened(*slugs: str) -> dict[str, str]:
        return {
            ".dvcignore": "\n".join(["/downloads", HIDE_ALL, *(f"!experiments/{s}/dvc.yaml" for s in slugs)]) + "\n"
        }

    clones.commit(opened("default"))
    clones.git("switch", "theirs")
    clones.git("merge", "main")
    clones.git("switch", "main")
    code, said = clones.merged(opened("default", "a"), opened("default", "b"))
    assert code == 0, said
    layout = Layout(clones.root, clones.root)
    assert sorted(open_studies(layout)) == ["a", "b", "default"]
    assert clones.read(".dvcignore").splitlines()[:2] == ["/downloads", HIDE_ALL]
