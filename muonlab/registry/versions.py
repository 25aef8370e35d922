"""Every version of a file that a commit reachable from HEAD holds, told apart without reading them.

Git names a version by a hash of its content,

    id = SHA-1("blob <size>\\0" + content)        (SHA-256 in a repository that uses it)

so whether a text begins with a version is told by hashing as much of the text. Merges are followed into all their
parents: also a version that a merge dropped is one. Outside git, and before the first commit, there is none.
Source: Chacon and Straub, Pro Git (2014), 10.2 Git Objects.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

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


def read_version(path: Path, version: Version) -> bytes:
    """The content of a version."""
    return _git(path, "cat-file", "blob", version.id)


def _git(path: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=path.parent, input=stdin, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
