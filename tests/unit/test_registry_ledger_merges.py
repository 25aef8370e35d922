"""What git does to a ledger: union merges, deletions in some old commit, versions told apart without being read."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_registry_ledger import record

from muonlab.registry import ledger, versions
from muonlab.registry.canonical import sha256_of


class Git:
    """A repository with a ledger that git merges by union."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "ledger.jsonl"
        self("init", "--initial-branch=main")
        (root / ".gitattributes").write_text("ledger.jsonl merge=union\n")
        self("add", ".")
        self("commit", "-m", "start")

    def __call__(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout

    def holds(self, *seeds: int) -> None:
        """Commit a ledger of exactly these rows."""
        self.path.write_text("".join(ledger.to_line(record(seed)) + "\n" for seed in seeds))
        self("add", ".")
        self("commit", "--allow-empty", "-m", "rows")


@pytest.fixture
def git(tmp_path: Path) -> Git:
    return Git(tmp_path)


def seeds_of(held: ledger.Ledger) -> list[int]:
    return sorted(r.seed for r in held.records)


def test_a_line_that_both_sides_of_a_merge_added_is_one_row(git: Git) -> None:
    git.holds(0)
    git("switch", "-c", "side")
    git.holds(0, 1, 2)
    git("switch", "main")
    git.holds(0, 2, 3, 1)
    git("merge", "-m", "both", "side")
    assert len(git.path.read_text().splitlines()) > 4
    held = ledger.read(git.path)
    assert seeds_of(held) == [0, 1, 2, 3]
    assert not held.findings


def test_an_attempt_with_two_contents_in_one_file_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [ledger.to_line(record(0, loss, attempt_id="a")) for loss in (5.0, 4.0)]
    path.write_text("\n".join(lines) + "\n")
    held = ledger.read(path)
    assert [r.val_loss for r in held.records] == [5.0]
    assert "ledger.jsonl line 2 is the attempt a, which an earlier line has with another content" in held.findings[0]


def test_the_hash_of_the_content_knows_no_order_and_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [ledger.to_line(record(seed)) + "\n" for seed in range(3)]

    def of(*chosen: str) -> str:
        path.write_text("".join(chosen))
        return ledger.content_sha256(path)

    hashes = {of(*order) for order in itertools.permutations([*lines, lines[0]])}
    assert len(hashes) == 1
    command = "LC_ALL=C sort -u ledger.jsonl | sha256sum"
    assert hashes == {subprocess.check_output(command, shell=True, cwd=tmp_path, text=True).split()[0]}
    assert of(*lines[1:]) not in hashes


@pytest.mark.parametrize("dropped_by", ["commit", "merge"])
def test_what_an_old_version_held_comes_back_also_when_a_merge_dropped_it(git: Git, dropped_by: str) -> None:
    git.holds(0)
    if dropped_by == "commit":
        git.holds(0, 1)
        git.holds(0)
    else:
        git("switch", "-c", "side")
        git.holds(0, 1)
        git("switch", "main")
        git("merge", "--strategy", "ours", "-m", "drop theirs", "side")
    git.holds(0, 2)
    git.holds(0, 2, 3)
    assert ledger.lost_lines(git.path, git.path.read_bytes()) == [ledger.to_line(record(1))]
    held = ledger.append(git.path, [])
    assert seeds_of(held) == [0, 1, 2, 3]
    assert "put back" in held.notes[0]


def test_of_a_file_that_has_only_grown_no_old_version_is_read(git: Git) -> None:
    for rows in range(1, 6):
        git.holds(*range(rows))
    content = git.path.read_bytes()
    known = versions.newest_first(git.path)
    assert [version.size for version in known] == sorted({version.size for version in known}, reverse=True)
    assert len(known) == 5
    assert all(version.begins(content) for version in known)
    # One byte is another version, and so is one line less in the middle.
    assert not any(version.begins(b"[" + content[1:]) for version in known)
    shorter = b"".join(content.splitlines(keepends=True)[1:])
    assert not any(version.begins(shorter) for version in known)


@pytest.mark.parametrize("memory", ["kept", "lost", "damaged", "of another form"])
def test_what_is_remembered_of_old_versions_changes_no_answer(git: Git, memory: str) -> None:
    for rows in range(1, 4):
        git.holds(*range(rows))
    git("switch", "-c", "side")
    git.holds(0, 1, 2, 9)
    git("switch", "main")
    git.holds(0, 1, 2, 3)
    git.holds(0, 1, 2, 3, 9)
    git("merge", "--strategy", "ours", "-m", "both", "side")
    content = git.path.read_bytes()
    known = versions.newest_first(git.path)
    assert ledger.lost_lines(git.path, content) == []
    remembered = git.path.with_suffix(".versions")
    (side,) = json.loads(remembered.read_text())["within"]
    if memory == "lost":
        remembered.unlink()
    elif memory == "damaged":
        remembered.write_bytes(remembered.read_bytes()[:100])
    elif memory == "of another form":
        remembered.write_text('{"sha256": [1]}')
    lines = content.splitlines(keepends=True)
    for kept in (lines, [*lines, b"{}\n"], lines[:3], [*lines[:2], *lines[3:]], lines[:-1], lines[::-1], []):
        text = b"".join(kept)
        begun = versions.Memory(git.path, anew=False).begun_by(text, known)
        assert begun == {version for version in known if version.begins(text)}
        lost = {line.decode().strip() for line in lines if line not in kept}
        assert set(ledger.lost_lines(git.path, text, anew=False)) == lost
    assert side in {version.id for version in known}


def test_a_version_whose_lines_are_all_in_a_later_one_is_read_once(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    git.holds(0, 1)
    git.holds(1, 0)
    git.holds(1, 0, 2)
    assert ledger.lost_lines(git.path, git.path.read_bytes()) == []
    monkeypatch.setattr(versions, "read_version", lambda *_: pytest.fail("it was read again"))
    assert ledger.lost_lines(git.path, git.path.read_bytes(), anew=False) == []


def test_what_was_remembered_hides_nothing_from_who_looks_anew(git: Git) -> None:
    git.holds(0, 1)
    git.holds(1, 0)
    content = git.path.read_bytes()
    assert ledger.lost_lines(git.path, content) == []
    remembered = git.path.with_suffix(".versions")
    forged = json.loads(remembered.read_text())
    (newest,) = (version for version in versions.newest_first(git.path) if version.begins(content))
    short = content.splitlines(keepends=True)[0] + b"x" * (newest.size - len(content.splitlines(keepends=True)[0]))
    forged["sha256"][newest.id] = hashlib.sha256(short).hexdigest()
    remembered.write_text(json.dumps(forged))
    assert ledger.lost_lines(git.path, short, anew=False) == []
    assert ledger.lost_lines(git.path, short) == [ledger.to_line(record(0))]


@given(history=st.lists(st.lists(st.integers(0, 4), max_size=5, unique=True), max_size=5))
@settings(max_examples=15, deadline=None)
def test_whatever_was_ever_committed_is_held_after_an_append(
    history: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    git = Git(tmp_path_factory.mktemp("history"))
    for rows in history:
        git.holds(*rows)
    held = ledger.append(git.path, [record(9)])
    assert set(seeds_of(held)) == {9, *itertools.chain(*history)}
    assert ledger.lost_lines(git.path, git.path.read_bytes()) == []


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c", "\r"])
def test_a_line_ends_where_it_was_ended_and_nowhere_in_its_strings(end: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    failed = record(0, None, error=f"out of memory{end}at step 3")
    assert ledger.append(path, [failed]).records == [failed]
    assert ledger.read(path) == ledger.Ledger([failed], [], [])


def test_a_line_spelled_otherwise_is_the_same_record(tmp_path: Path) -> None:
    content = json.loads(ledger.to_line(record()))
    assert ledger.parse_line(json.dumps(content, indent=None)) == record()


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (3, "a newer one wrote it; update muonlab (`git pull`, then `make setup`)"),
        (0, "no migration is needed; take it back from git"),
        ("1", "no migration is needed; take it back from git"),
        (None, "no migration is needed; take it back from git"),
    ],
)
def test_a_line_of_another_version_says_what_to_do(version: object, says: str, tmp_path: Path) -> None:
    content = {**record().model_dump(mode="json"), "schema_version": version}
    if version is None:
        del content["schema_version"]
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({**content, "sha256": sha256_of(content)}, sort_keys=True, separators=(",", ":")) + "\n")
    (finding,) = ledger.read(path).findings
    assert finding.startswith(f"ledger.jsonl line 1 has schema_version {version!r}, and this muonlab reads 1")
    assert says in finding
