"""The ledger: every attempt at every cell, append-only, one JSON object a line with its own SHA-256.

One file serves all studies, since cells are shared between them. Appending is safe from several processes;
reading verifies every line. The rules of a merge:

- the same attempt, with the same content, is one row; with different content it is a finding;
- two attempts at one cell with the same outcome are one row (the first);
- two attempts at one cell with different outcomes are both kept, and the cell is a conflict.

A line that git's history of the file holds and the file no longer does is put back, and reported.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from pydantic import ValidationError

from muonlab.registry.canonical import canonical_json, sha256_of
from muonlab.registry.record import RunRecord


class Ledger(NamedTuple):
    """The verified rows of a ledger file, and what was found wrong with it."""

    records: list[RunRecord]
    findings: list[str]
    """Sentences, each naming a line or a cell whose record cannot be trusted."""
    notes: list[str]
    """Sentences on what was mended: rows that had been deleted and are put back."""


def to_line(record: RunRecord) -> str:
    """The line that stands for a record: its canonical JSON with the SHA-256 of the rest added."""
    content = record.model_dump(mode="json")
    return canonical_json({**content, "sha256": sha256_of(content)})


def parse_line(line: str) -> RunRecord:
    """Return the record of a line; raises ValueError with the reason when the line is not what was written."""
    try:
        content = json.loads(line)
        stated = content.pop("sha256")
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("is not a ledger line") from error
    if content.get("schema_version") != 1:
        raise ValueError(f"has schema_version {content.get('schema_version')!r}, which this version (1) cannot read")
    if sha256_of(content) != stated:
        raise ValueError("was edited after it was written (its sha256 does not match)")
    try:
        return RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"is not a valid record ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error


def read(path: Path) -> Ledger:
    """Read and verify a ledger file; a missing file is an empty ledger."""
    records: list[RunRecord] = []
    findings: list[str] = []
    if not path.exists():
        return Ledger(records, findings, [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse_line(line))
        except ValueError as error:
            findings.append(f"{path.name} line {number} {error}.")
    return Ledger(records, findings, [])


def committed_lines(path: Path) -> list[str]:
    """Every line that any commit reachable from HEAD added to the file, oldest first; none outside git."""
    command = ["git", "log", "--reverse", "--format=", "-p", "--unified=0", "--no-color", "--", path.name]
    try:
        shown = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line[1:] for line in shown.splitlines() if line.startswith("+{")]


def append(path: Path, records: Iterable[RunRecord]) -> Ledger:
    """Merge records into the ledger file, put back committed lines that vanished, and return what it now holds.

    Nothing that stands in the file is ever rewritten. The findings name edited lines, restored lines and
    attempts whose content differs from what the ledger holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        ledger = read(path)
        known = {record.attempt_id: record for record in ledger.records}
        outcomes = {(r.cell_digest, r.outcome()) for r in ledger.records if r.is_result}
        findings = list(ledger.findings)
        notes: list[str] = []
        new: list[RunRecord] = []

        def admit(record: RunRecord, *, restored: bool) -> None:
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
            if record.is_result and (record.cell_digest, record.outcome()) in outcomes:
                return
            known[record.attempt_id] = record
            if record.is_result:
                outcomes.add((record.cell_digest, record.outcome()))
            new.append(record)
            if restored:
                notes.append(
                    f"cell {record.arm}-{record.seed} ({record.cell_digest[:12]}): its row was deleted from "
                    f"{path.name}; it is put back from git's history."
                )

        for line in committed_lines(path):
            try:
                admit(parse_line(line), restored=True)
            except ValueError:
                continue  # an older edit, already answered for where it stands
        for record in records:
            admit(record, restored=False)
        if new:
            _append_lines(path, [to_line(record) for record in new])
        return Ledger([*ledger.records, *new], findings, notes)


def _append_lines(path: Path, lines: list[str]) -> None:
    # A power cut can leave a last line without its end; a new row must not be glued to it.
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + "".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
