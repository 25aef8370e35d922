"""What is known of one study at one moment: its declared grid, the attempts at its cells, and what looks wrong.

Written by the collect stage as `reports/<study>/registry.json`; statistics and report read nothing else of the
runs, so that they can be made again from a ledger without the runs.
"""

from __future__ import annotations

from typing import Any, Literal

from muonlab.registry.acceptance import Acceptance
from muonlab.registry.canonical import sha256_of
from muonlab.registry.record import RunRecord
from muonlab.registry.settings import Closed, Name, Seed, WorkloadSettings
from muonlab.registry.study import ReportedWorkload, Study


class DeclaredCell(Closed):
    """One cell of the grid, and what it must compute."""

    arm: Name
    seed: Seed
    digest: str
    older: list[str] = []
    """Its digests under other code, which was accepted as computing the same."""

    @property
    def digests(self) -> tuple[str, ...]:
        """Every digest whose records are of this cell."""
        return (self.digest, *self.older)


class KnownRun(Closed):
    """A result that the ledger holds and the declared grid does not, and in whose name it was made."""

    arm: Name
    seed: Seed
    digest: str
    study: Name | None


class Override(Closed):
    """That a study was started although a gate was closed."""

    at: str
    """UTC, ISO 8601."""
    commit: str | None
    gates: list[str]
    """What was asked and what was found, a sentence each."""


class GateState(Closed):
    """One thing that a study asks for before it may start, and how it stands now."""

    asks: str
    """In words."""
    found: str
    """In words."""
    is_open: bool

    @property
    def asking(self) -> str:
        """The part of the sentence that stays the same while the gate opens and closes."""
        return f"asks for {self.asks}"

    @property
    def sentence(self) -> str:
        """What is asked and what was found, about `the study`."""
        return f"{self.asking}; found: {self.found}"


class ArmTuning(Closed):
    """How an arm's options were chosen."""

    study: Name
    runs: int
    """All that the tuning study made for the arm, diverged ones too."""
    seeds: list[Seed]
    tried: dict[str, list[Any]]
    """Option -> the values tried."""
    chosen: dict[str, Any]
    in_use: bool
    """The arm runs here with the values that were chosen."""
    at_edge: list[str] = []
    """Options whose chosen value is the smallest or largest that was tried."""


class Selection(Closed):
    """By what a study's challengers were selected that declares `selected_from`."""

    study: Name
    """The selecting one."""
    out_of: int
    """Its challengers."""
    same_workload: bool
    means: dict[Name, float]
    """Challenger -> mean final loss there, in nats/token; empty where its whole report is not here."""
    picked: Name | None
    """The one with the lowest; null where that is not known."""


class Registration(Closed):
    """The declaration as it was hashed before the first result (`experiments/<study>/registration.json`)."""

    schema_version: Literal[1] = 1
    registration: str
    registered_at: str
    commit: str | None
    declaration: dict[str, Any]
    """`study`: what was declared; `arms` and `settings`: what its names resolved to."""
    overrides: list[Override] = []
    """Starts against a closed gate; no part of what is hashed."""

    @property
    def is_whole(self) -> bool:
        """Whether the declaration still hashes to the registration, so that neither was edited alone."""
        arms = {key: value for key, value in self.declaration.items() if key != "study"}
        return sha256_of({"study": self.declaration.get("study"), "arms": arms}) == self.registration

    @property
    def challengers(self) -> list[str]:
        """The challengers as they were registered."""
        return list(self.declaration.get("study", {}).get("challengers", []))

    @property
    def arms(self) -> list[str]:
        """All arms as they were registered, baseline first."""
        study = self.declaration.get("study", {})
        others = (arm for role in ("challengers", "control", "reference") for arm in study.get(role, []))
        return [*([study["baseline"]] if "baseline" in study else []), *others]


class Snapshot(Closed):
    """A study's declaration, grid and records, with the findings of the collection."""

    schema_version: Literal[1] = 1
    study: Study
    settings: WorkloadSettings | ReportedWorkload
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
    described: list[str] = []
    """Of provenance `reported`: what else was reported and what it is worth, in sentences."""
    left_out: list[KnownRun] = []
    """Results at the declared arms on seeds that the declaration leaves out, in whoever's name they were made."""
    outside: list[KnownRun] = []
    """Results of other arms, or variants of arms, on the declared seeds, that started as the baseline did."""
    gates: list[GateState] = []
    """What the study asks for before it may start, as it stands now."""
    tuning: dict[Name, ArmTuning] = {}
    """Arm -> how its options were chosen; an arm that no tuning study has tried is not in it."""
    acceptances: list[Acceptance] = []
    """By which cells of the grid were carried over to the code that there is now."""
    selection: Selection | None = None
    """Of a study that confirms what another one's results have picked."""
    ledger_sha256: str
    judged_by: str
    """SHA-256 over the code that judges and reports: other code makes the report anew."""

    @property
    def digests(self) -> set[str]:
        """Every digest whose records are of a declared cell."""
        return {digest for cell in self.cells for digest in cell.digests}

    def attempts_at(self, cell: DeclaredCell) -> list[RunRecord]:
        """The attempts at a declared cell, first to last."""
        digests = cell.digests  # made anew each time it is asked for
        return [r for r in self.records if r.cell_digest in digests]

    def outcome_of(self, cell: DeclaredCell) -> RunRecord | None:
        """The attempt that counts for a declared cell: its first that ended with a result."""
        return next((r for r in self.attempts_at(cell) if r.is_result), None)

    @property
    def amendments(self) -> list[str]:
        """Why what is declared now was not declared before the results, in sentences; empty where it was."""
        found = []
        held = self.registration.registration if self.registration else None
        own = {r.registration for r in self.records if r.study == self.study.slug and r.is_result}
        if held is not None and held != self.current_registration:
            found.append("the declaration was changed after it was registered")
        elif other := sorted(str(hash_)[:12] for hash_ in own - {None, self.current_registration}):
            found.append(
                f"results were recorded under another declaration ({', '.join(other)}) than the one registered now "
                f"({self.current_registration[:12]})"
            )
        # A rehearsal decides nothing, so that it may share what other rehearsals have trained.
        if self.study.twin_of is None and (borrowed := self.borrowed(self.study.challengers)):
            listed = ", ".join(f"{cell.arm}-{cell.seed}" for cell in borrowed)
            found.append(
                f"a challenger's results were not made under this declaration but before or beside it: {listed}"
            )
        return found

    @property
    def amended(self) -> bool:
        """Whether what is declared now may have been chosen by results: then only the pure e-process decides."""
        return bool(self.amendments)

    def borrowed(self, arms: list[str]) -> list[DeclaredCell]:
        """The cells of these arms whose result was made for another study, or for none.

        Sharing the baseline's runs decides nothing; a challenger whose runs were there first may have been picked by
        them. In whose name a run was made is in its hashed record, so that no clock is asked.
        """
        results = [(c, self.outcome_of(c)) for c in self.cells if c.arm in arms]
        return [c for c, result in results if result is not None and result.study != self.study.slug]
