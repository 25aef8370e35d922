"""The ledger: every attempt at every cell, append-only, one JSON object a line with its own SHA-256.

A line of schema_version 1 is an attempt; one of 2 an acceptance (muonlab.registry.acceptance), which a version of
muonlab that knows none refuses in a sentence.

One file serves all studies, since cells are shared between them. Appending is safe from several processes;
reading verifies every line. The rules of a merge:

- the same attempt, with the same content, is one row; with different content it is a finding;
- two attempts at one cell with the same outcome are one row (the first);
- two attempts at one cell with different outcomes are both kept, and the cell is a conflict, unless both say of
  themselves that they repeat to rounding only and their losses agree that far: then the first counts.

A line that git's history of the file holds and the file no longer does is put back, and reported. All lines are
verified and all committed versions compared each time. What was found out of a version is remembered for commands
that only look (`anew=False`); what a verdict rests on is found out again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from pydantic import ValidationError

from muonlab.registry import versions
from muonlab.registry.acceptance import Acceptance
from muonlab.registry.canonical import canonical_json, sha256_of
from muonlab.registry.record import RunRecord

ROWS: dict[int, type[RunRecord] | type[Acceptance]] = {1: RunRecord, 2: Acceptance}
"""schema_version -> what a line of it holds."""
KEPT_VERSIONS = 4
"""Committed versions kept in memory, to tell still older ones by."""


class Ledger(NamedTuple):
    """The verified rows of a ledger file, and what was found wrong with it."""

    records: list[RunRecord]
    findings: list[str]
    """Sentences, each naming a line or a cell whose record cannot be trusted."""
    notes: list[str]
    """Sentences on what was mended: rows that had been deleted and are put back."""
    acceptances: tuple[Acceptance, ...] = ()
    """The comparisons of code, by their time."""


def to_line(row: RunRecord | Acceptance) -> str:
    """The line that stands for a row: its canonical JSON with the SHA-256 of the rest added."""
    content = row.model_dump(mode="json")
    return canonical_json({**content, "sha256": sha256_of(content)})


def parse_line(line: str) -> RunRecord | Acceptance:
    """Return the row of a line; raises ValueError with the reason when the line is not what was written."""
    return _parse(line.encode(errors="replace"))


def _parse(line: bytes) -> RunRecord | Acceptance:
    record = _as_written(line)
    return record if record is not None else _parse_slowly(line.decode(errors="replace"))


def _as_written(line: bytes) -> RunRecord | None:
    """The record of a line that is spelled as `to_line` spells it and hashes to what it states; None for any other.

    The hashed text is then the line without its hash, so that nothing need be spelled again to verify it.
    """
    stated = _STATED.search(line)
    # Canonical JSON knows no NaN, which the reader of records would let pass.
    if stated is None or b"NaN" in line or b"Infinity" in line:
        return None
    text = line[: stated.start()] + line[stated.end() :]
    if hashlib.sha256(text).hexdigest().encode() != stated[1]:
        return None
    try:
        record = RunRecord.model_validate_json(text)
    except ValidationError:
        return None
    return record if "schema_version" in record.model_fields_set else None


_STATED = re.compile(rb',"sha256":"([0-9a-f]{64})"')


def _parse_slowly(line: str) -> RunRecord | Acceptance:
    try:
        content = json.loads(line)
        stated = content.pop("sha256")
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, json.JSONDecodeError) and line.startswith("{"):
            raise ValueError(
                "is not a ledger line: it is cut short (its writing was stopped in the middle, or it was edited); "
                "`muon study status` records its attempt again where the run was made, and then the line can be deleted"
            ) from error
        raise ValueError("is not a ledger line") from error
    version = content.get("schema_version")
    if type(version) is not int or version not in ROWS:
        raise ValueError(_of_another_version(version))
    if sha256_of(content) != stated:
        raise ValueError("was edited after it was written (its sha256 does not match)")
    try:
        return ROWS[version].model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"is not a valid record ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error


def _of_another_version(version: object) -> str:
    has = f"has schema_version {version!r}, and this muonlab reads {' and '.join(map(str, ROWS))}"
    if isinstance(version, int) and version > max(ROWS):
        return f"{has}: a newer one wrote it; update muonlab (`git pull`, then `make setup`)"
    return f"{has}, all there have been: the line was edited, and no migration is needed; take it back from git"


def read(path: Path) -> Ledger:
    """Read and verify a ledger file; a missing file is an empty ledger."""
    return _read(path, path.read_bytes() if path.exists() else b"")


def _read(path: Path, content: bytes) -> Ledger:
    records: dict[str, RunRecord] = {}
    accepted: dict[str, Acceptance] = {}
    findings: list[str] = []
    with _no_garbage():
        # Bytes are split where lines were ended: str.splitlines also knows ends that JSON has in its strings.
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
            except ValueError as error:
                findings.append(f"{path.name} line {number} {error}.")
                continue
            if isinstance(record, Acceptance):
                if accepted.setdefault(record.acceptance_id, record) != record:
                    findings.append(
                        f"{path.name} line {number} is the acceptance {record.acceptance_id}, which an earlier line "
                        "has with another content; one of the two was edited."
                    )
                continue
            held = records.setdefault(record.attempt_id, record)
            # A merge by git's union keeps a line that both sides have added twice.
            if held is not record and held != record:
                findings.append(
                    f"{path.name} line {number} is the attempt {record.attempt_id}, which an earlier line has with "
                    "another content; one of the two was edited."
                )
    return Ledger(list(records.values()), findings, [], _by_time(accepted.values()))


def _by_time(acceptances: Iterable[Acceptance]) -> tuple[Acceptance, ...]:
    # In an order of their own, as the records are taken: that of the lines is another one in another clone.
    return tuple(sorted(acceptances, key=lambda a: (a.made_at, a.acceptance_id)))


@contextmanager
def _no_garbage() -> Iterator[None]:
    # What is read holds no cycles and stays; the collector would look through all of it again and again,
    # while it is read and (were it not set aside) ever after.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def content_sha256(path: Path) -> str:
    """SHA-256 of what a ledger file holds, whatever the order of its lines: `LC_ALL=C sort -u FILE | sha256sum`.

    Two clones that hold the same lines have the same hash, whichever of them merged the other's. Empty without a file.
    """
    if not path.exists():
        return ""
    lines = {line for line in path.read_bytes().split(b"\n") if line}
    return hashlib.sha256(b"".join(line + b"\n" for line in sorted(lines))).hexdigest()


def lost_lines(path: Path, content: bytes, *, anew: bool = True) -> list[str]:
    """Lines of committed versions of the ledger that its `content` has not, oldest first; none outside git.

    A version with which the content begins has none of them and is not read, nor is one whose lines are all in such.
    `anew`: nothing is trusted that an earlier call has remembered of the versions.
    """
    found: list[list[bytes]] = []
    # The last few that were read: most often, what an older version is the beginning of.
    texts: deque[bytes] = deque(maxlen=KEPT_VERSIONS)
    known = versions.newest_first(path)
    memory = versions.Memory(path, anew=anew)
    begun = memory.begun_by(content, known)
    newest = max(begun, key=lambda version: version.size, default=None)
    held: set[bytes] = set()
    committed: set[bytes] = set()
    for version in known:
        if version in begun or memory.is_within(version, begun) or any(version.begins(text) for text in texts):
            continue
        text = versions.read_version(path, version)
        texts.append(text)
        rows = dict.fromkeys(line for line in text.split(b"\n") if line.startswith(b"{"))
        held = held or set(content.split(b"\n"))
        found.append([line for line in rows if line not in held])
        if newest is not None:
            committed = committed or set(content[: newest.size].split(b"\n"))
            if rows.keys() <= committed:
                memory.add_within(version, newest)
    memory.save()
    lines = dict.fromkeys(line for version_lines in reversed(found) for line in version_lines)
    return [line.decode(errors="replace") for line in lines]


def append(path: Path, records: Iterable[RunRecord | Acceptance], *, anew: bool = True) -> Ledger:
    """Merge rows into the ledger file, put back committed lines that vanished, and return what it now holds.

    Nothing that stands in the file is ever rewritten; `anew` is that of `lost_lines`. The findings name edited lines,
    restored lines and attempts whose content differs from what the ledger holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        content = path.read_bytes() if path.exists() else b""
        # Git and its hashes run outside Python's lock, beside the parsing of lines.
        with ThreadPoolExecutor(max_workers=1) as beside:
            lost = beside.submit(lost_lines, path, content, anew=anew)
            ledger = _read(path, content)
        known = {record.attempt_id: record for record in ledger.records}
        findings = list(ledger.findings)
        notes: list[str] = []
        new: list[RunRecord | Acceptance] = []
        accepted = {row.acceptance_id: row for row in ledger.acceptances}

        @cache  # most readings bring nothing new, and then nothing asks
        def outcomes() -> set[tuple[str, object]]:
            return {(r.cell_digest, r.outcome()) for r in ledger.records if r.is_result}

        def admit(record: RunRecord | Acceptance, *, restored: bool) -> None:
            if isinstance(record, Acceptance):
                if record.acceptance_id not in accepted:
                    accepted[record.acceptance_id] = record
                    new.append(record)
                    if restored:
                        notes.append(
                            f"the acceptance {record.acceptance_id} of {record.study}: its row was deleted from "
                            f"{path.name}; it is put back from git's history."
                        )
                return
            held = known.get(record.attempt_id)
            if held is not None:
                if held != record:
                    findings.append(
                        f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): attempt {record.attempt_id} "
                        f"has val_loss {record.val_loss} where it ran but {held.val_loss} in the ledger; "
                        "one of the two was edited."
                        if held.val_loss != record.val_loss
                        else f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): attempt "
                        f"{record.attempt_id} differs from its row in the ledger; one of the two was edited."
                    )
                return
            if record.is_result and (record.cell_digest, record.outcome()) in outcomes():
                return
            known[record.attempt_id] = record
            if record.is_result:
                outcomes().add((record.cell_digest, record.outcome()))
            new.append(record)
            if restored:
                notes.append(
                    f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): its row was deleted from "
                    f"{path.name}; it is put back from git's history."
                )

        for line in lost.result():
            try:
                admit(parse_line(line), restored=True)
            except ValueError:
                continue  # an older edit, already answered for where it stands
        for record in records:
            admit(record, restored=False)
        if new:
            # A killed writer can leave a last line without its end; a new row must not be glued to it.
            torn = content != b"" and not content.endswith(b"\n")
            _append_bytes(path, (("\n" if torn else "") + "".join(to_line(r) + "\n" for r in new)).encode())
        added = [row for row in new if isinstance(row, RunRecord)]
        return Ledger([*ledger.records, *added], findings, notes, _by_time(accepted.values()))


def _append_bytes(path: Path, added: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            left = memoryview(added)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:  # the disk is full: no part of a row is left behind
            file.truncate(before)
            raise
