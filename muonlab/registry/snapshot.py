"""What is known of one study at one moment: its declared grid, the attempts at its cells, and what looks wrong.

Written by the collect stage as `reports/<study>/registry.json`; statistics and report read nothing else of the
runs, so that they can be made again from a ledger without the runs.
"""

from __future__ import annotations

from typing import Literal

from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Closed, Name, Seed, WorkloadSettings
from muonlab.registry.study import Study


class DeclaredCell(Closed):
    """One cell of the grid, and what it must compute."""

    arm: Name
    seed: Seed
    digest: str


class Registration(Closed):
    """The declaration as it was hashed before the first result (`experiments/<study>/registration.json`)."""

    schema_version: Literal[1] = 1
    registration: str
    registered_at: str
    commit: str | None
    declaration: dict[str, object]


class Snapshot(Closed):
    """A study's declaration, grid and records, with the findings of the collection."""

    schema_version: Literal[1] = 1
    study: Study
    settings: WorkloadSettings
    optimizers: dict[Name, dict[str, object]]
    """Arm -> kind and all its options, as they were resolved."""
    cells: list[DeclaredCell]
    records: list[RunRecord]
    """All attempts at the grid's cells, and all attempts that were made in the study's name."""
    registration: Registration | None
    current_registration: str
    """Hash of the declaration as it reads now."""
    findings: list[str]
    """Evidence that contradicts itself: any of them makes the study INVALID."""
    notes: list[str]
    ledger_sha256: str
    judged_by: str
    """SHA-256 over the code that judges and reports: other code makes the report anew."""

    @property
    def amended(self) -> bool:
        """Whether the declaration was changed after it was registered."""
        return self.registration is not None and self.registration.registration != self.current_registration
