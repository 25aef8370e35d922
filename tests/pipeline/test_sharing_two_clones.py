"""Two clones run different cells of one study and end with one verdict: by the commands of docs/sharing.md."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, STUDY, Maker, Repository

ALL = f"{STUDY}/*"


def clone_of(origin: Path, into: Path, like: Repository) -> Repository:
    """A colleague's clone, with the data that DVC would prepare there anew."""
    subprocess.run(["git", "clone", "-q", str(origin), str(into)], check=True)
    clone = Repository(into)
    clone.git("config", "user.name", "colleague")
    clone.git("config", "user.email", "c@example.org")
    for name in (".dvc/cache", "data/toy"):
        clone.run("cp", "-a", str(like.root / name), str(into / name))
    return clone


def set_up(repository: Repository) -> None:
    repository.run(sys.executable, "-m", "muonlab.pipeline.merging")


def pull(repository: Repository) -> str:
    done = repository.run("git", "pull", "--no-rebase", "--no-edit")
    return done.stdout + done.stderr


def share(repository: Repository) -> None:
    repository.dvc("push")
    repository.muon("commit", "cells")


def restore(repository: Repository) -> None:
    """Bring all cells, and conclude: nothing is trained a second time."""
    repository.muon("download", "--run", ALL)
    done = repository.muon("study", "run")
    assert "4 cells, 4 in place or restored from cache, 0 waiting to be taken over, 0 to train" in done.stderr


@pytest.mark.slow
def test_two_clones_run_different_cells_and_end_with_one_verdict(make: Maker, tmp_path: Path) -> None:
    ours = make(tmp_path / "ours")
    shutil.copyfile(PROJECT / ".gitattributes", ours.root / ".gitattributes")
    ours.dvc("remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    (ours.root / "data" / ".gitignore").write_text("/toy\n/fingerprint\n")  # as DVC does where it prepares the data
    ours.git("rm", "-rq", "--cached", "data/toy")
    ours.commit("shared")
    origin = tmp_path / "origin.git"
    ours.git("clone", "-q", "--bare", ".", str(origin))
    ours.git("remote", "add", "origin", str(origin))
    ours.git("fetch", "-q", "origin")
    ours.git("branch", "-q", "--set-upstream-to", f"origin/{ours.git('branch', '--show-current').strip()}")
    theirs = clone_of(origin, tmp_path / "theirs", ours)
    for clone, cells in ((ours, "muon-*"), (theirs, "nolah-*")):
        set_up(clone)
        done = clone.muon("study", "run", "--only", cells, check=False)
        assert (done.returncode, len(clone.attempts())) == (3, 2), done.stderr
        share(clone)
    ours.git("push", "-q")

    # Both have registered, written reports and locked cells: the merge asks nothing of anybody.
    said = pull(theirs)
    assert f"reports/{STUDY}: ours is kept; `muon study run {STUDY}` makes it of the runs of both sides" in said
    assert "CONFLICT" not in said
    assert sorted((row["arm"], row["seed"]) for row in theirs.ledger()) == [
        ("muon", 0), ("muon", 1), ("nolah", 0), ("nolah", 1),
    ]  # fmt: skip
    locked = yaml.safe_load((theirs.root / "experiments" / STUDY / "dvc.lock").read_text())["stages"]
    assert set(locked) >= {f"train@{arm}-{seed}" for arm in ("muon", "nolah") for seed in (0, 1)}
    restore(theirs)
    share(theirs)
    theirs.git("push", "-q")

    pull(ours)
    restore(ours)
    assert [len(clone.attempts()) for clone in (ours, theirs)] == [2, 2]
    verdict, same = (clone.read(f"reports/{STUDY}/verdict.json") for clone in (ours, theirs))
    assert verdict == same
    assert verdict["complete"]
    assert ours.ledger() == theirs.ledger()
    assert ours.git("status", "--porcelain", "--untracked-files=no") == ""
