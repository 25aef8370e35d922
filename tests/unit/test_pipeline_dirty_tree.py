"""A dirty tree: what counts as one, and a hash of the difference that depends on what differs and on nothing else."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from muonlab.pipeline.processes import difference, dirty_text, provenance

PARAMS = """\
# the one cell
optimizer: muon
seed: 0
workload: tiny
study: 001-x
optimizers:
  nolah: {scale: 0.90}   # damped
"""
STUDY = """\
study:
  slug: 001-x
  seeds: [0, 1]
  decision: {min_effect: 1%}
"""
FIXED = STUDY.replace("min_effect: 1%", "min_effect: 1%, plan: {fixed: 2}")
FILES = {
    "params.yaml": PARAMS,
    "optim/nolah.py": "SCALE = 1\n",
    "experiments/001-x/study.yaml": STUDY,
    "experiments/002-x/study.yaml": FIXED,
    "experiments/001-x/dvc.yaml": "stages: {}\n",
    "experiments/001-x/dvc.lock": "a\n",
    "experiments/001-x/registration.json": "{}\n",
    "experiments/ledger.jsonl": "{}\n",
    "reports/001-x/report.md": "a\n",
    ".dvcignore": "a\n",
    "README.md": "a\n",
}


def git(root: Path, *arguments: str) -> bytes:
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


CLEAN: dict[str, Callable[[Path], object]] = {
    "nothing": lambda root: None,
    "the one cell": lambda root: edit(
        root, "params.yaml", "muon\nseed: 0\nworkload: tiny", "nolah\nseed: 3\nworkload: a"
    ),
    "its study": lambda root: edit(root, "params.yaml", "study: 001-x", "study: 002-x"),
    "layout and comments": lambda root: edit(root, "params.yaml", "{scale: 0.90}   # damped", "\n    scale: 0.9"),
    "further seeds": lambda root: edit(root, "experiments/001-x/study.yaml", "[0, 1]", "[0, 1, 2]"),
    **{
        f"result {name}": lambda root, name=name: (root / name).write_text("b\n")  # type: ignore[misc]
        for name in FILES
        if not name.endswith(("study.yaml", "params.yaml", ".py"))
    },
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_a_run_leaves_behind_makes_no_dirty_tree(tree: Path, name: str) -> None:
    CLEAN[name](tree)
    assert difference(tree) == ([], None, [])
    assert dirty_text(difference(tree)) is None
    assert provenance(tree).diff_sha256 is None


DIRTY: dict[str, tuple[str, str, str]] = {
    "code": ("optim/nolah.py", "1", "2"),
    "an optimizer": ("params.yaml", "0.90", "0.95"),
    "a declaration": ("experiments/001-x/study.yaml", "1%", "2%"),
    "a fixed plan's seeds": ("experiments/002-x/study.yaml", "[0, 1]", "[0, 2]"),
}


@pytest.mark.parametrize("name", DIRTY)
def test_code_and_declarations_that_differ_are_named_and_hashed(tree: Path, name: str) -> None:
    file, old, new = DIRTY[name]
    edit(tree, file, old, new)
    found = difference(tree)
    assert found.files == [file]
    assert found.sha256 == provenance(tree).diff_sha256
    assert found.sha256 is not None
    said = dirty_text(found)
    assert said is not None
    assert file in said
    assert found.sha256[:12] in said
    # Neither the cell that is trained nor the habits of a user's git change the hash.
    edit(tree, "params.yaml", "seed: 0", "seed: 7")
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.context", "9"), ("core.abbrev", "20")):
        git(tree, "config", key, value)
    git(tree, "add", "-A")
    assert difference(tree) == found


def test_the_hash_of_changed_code_is_that_of_its_git_diff(tree: Path) -> None:
    edit(tree, "optim/nolah.py", "1", "2")
    shown = git(tree, "diff", "HEAD", "--full-index", "--binary", "--", "optim")
    assert difference(tree).sha256 == hashlib.sha256(shown).hexdigest()


def test_every_difference_changes_the_hash(tree: Path) -> None:
    hashes = []
    for file, old, new in DIRTY.values():
        edit(tree, file, old, new)
        hashes.append(difference(tree).sha256)
    assert len(set(hashes)) == len(DIRTY)
    assert difference(tree).files == sorted(file for file, _, _ in DIRTY.values())


def test_code_that_git_does_not_know_is_named(tree: Path) -> None:
    (tree / "optim" / "mine.py").write_text("X = 1\n")
    found = difference(tree)
    assert found == ([], None, ["optim/mine.py"])
    assert dirty_text(found) == (
        "the tree is dirty: optim/mine.py is not in git; every record of a run that is made now holds that the code is "
        "not as committed."
    )
    assert provenance(tree).dirty


def test_outside_git_nothing_is_known(tmp_path: Path) -> None:
    assert difference(tmp_path) == ([], None, [])
