"""Every version of a file that a commit reachable from HEAD holds, told apart without reading them.

Git names a version by a hash of its content,

    id = SHA-1("blob <size>\\0" + content)        (SHA-256 in a repository that uses it)

so whether a text begins with a version is told by hashing as much of the text. The size in front makes that one pass
over the text for each version; the SHA-256 of the content alone, remembered once git's has matched, takes one for all.
A name never means another content: what is remembered cannot get out of date, and is found out again when it is gone.
Merges are followed into all their parents: also a version that a merge dropped is one. Outside git, and
before the first commit, there is none. Source: Chacon and Straub, Pro Git (2014), 10.2 Git Objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from muonlab.registry.files import write_atomically

NEWLINE = ord("\n")


class Version(NamedTuple):
    """One committed content of a file."""

    id: str
    """Git's name for it."""
    size: int
    """In bytes."""

    def begins(self, text: bytes) -> bool:
        """Whether a text begins with this version, or is it."""
        if self.size > len(text):
            return False
        # What begins with whole lines ends where one ends: most texts need no hashing.
        if 0 < self.size < len(text) and NEWLINE not in (text[self.size - 1], text[self.size]):
            return False
        digest = hashlib.new("sha1" if len(self.id) == 40 else "sha256", usedforsecurity=False)
        digest.update(b"blob %d\0" % self.size)
        digest.update(memoryview(text)[: self.size])
        return digest.hexdigest() == self.id


def newest_first(path: Path) -> list[Version]:
    """The versions of a file, each once, those of newer commits first."""
    log = _git(
        path, "-c", "log.showRoot=true", "log", "--full-history", "-m", "--raw", "--no-abbrev", "--no-renames",
        "--format=", "HEAD", "--", path.name,
    )  # fmt: skip
    # :<mode> <mode> <id before> <id after> <status>
    ids = [id_ for line in log.decode(errors="replace").splitlines() for id_ in reversed(line.split()[2:4])]
    asked = "".join(f"{id_}\n" for id_ in dict.fromkeys(ids) if id_.strip("0"))
    if not asked:
        return []
    sizes = _git(path, "cat-file", "--batch-check", stdin=asked.encode()).decode().splitlines()
    return [Version(found[0], int(found[2])) for line in sizes if (found := line.split())[1] == "blob"]


class Memory:
    """What was found out of a file's versions, in `<file>.versions` beside it.

    Of each: the SHA-256 of its content, once a text was seen that begins with it, or another version that has all of
    its lines. `anew`: what stands there is not trusted, and replaced.
    """

    def __init__(self, path: Path, *, anew: bool) -> None:
        self._path = path.with_suffix(".versions")
        found = {} if anew else _read_mapping(self._path)
        self._sha256 = found.get("sha256", {})
        self._within = found.get("within", {})
        self._changed = False

    def begun_by(self, content: bytes, known: Iterable[Version]) -> set[Version]:
        """Those of the versions with which `content` begins."""
        fitting = [version for version in known if version.size <= len(content)]
        hashes = _sha256_of_beginnings(content, {version.size for version in fitting})
        begun = set()
        for version in fitting:
            sha256 = hashes[version.size]
            if version.id in self._sha256:
                if self._sha256[version.id] == sha256:
                    begun.add(version)
            elif version.begins(content):
                begun.add(version)
                self._sha256[version.id] = sha256
                self._changed = True
        return begun

    def add_within(self, version: Version, larger: Version) -> None:
        """Remember that all lines of the one are lines of the other."""
        self._within[version.id] = larger.id
        self._changed = True

    def is_within(self, version: Version, larger: Iterable[Version]) -> bool:
        """Whether all lines of the one are known to be lines of one of the others."""
        return self._within.get(version.id) in {each.id for each in larger}

    def save(self) -> None:
        """Write what is new."""
        if self._changed:
            text = json.dumps({"sha256": self._sha256, "within": self._within})
            with contextlib.suppress(OSError):  # who only looks is not stopped by a full disk
                write_atomically(self._path, text, durable=False)


def _read_mapping(path: Path) -> dict[str, dict[str, str]]:
    """What was remembered; nothing where it was damaged."""
    try:
        found = json.loads(path.read_bytes())
        return {str(key): dict(found[key]) for key in found}
    except (OSError, ValueError, TypeError):
        return {}


def _sha256_of_beginnings(text: bytes, sizes: Iterable[int]) -> dict[int, str]:
    """Size -> SHA-256 of as much of the text."""
    digest, at, found = hashlib.sha256(), 0, {}
    view = memoryview(text)
    for size in sorted(sizes):
        digest.update(view[at:size])
        at, found[size] = size, digest.copy().hexdigest()
    return found


def read_version(path: Path, version: Version) -> bytes:
    """The content of a version."""
    return _git(path, "cat-file", "blob", version.id)


def _git(path: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=path.parent, input=stdin, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
