"""That code which was changed computes the same: `muon accept` held it against recorded runs, and what came of it.

A cell's digest holds a hash of the code (muonlab.registry.cell), so that a changed trainer makes another cell of it. An
acceptance is a row of the ledger which says that two digests, equal in all but their code, name one cell; the records
stay as they are. It goes from the digest that a record bears to the digest of the cell now, never from one acceptance
to the next, so that nothing adds up unseen. A comparison that found a difference is a row too, which carries nothing
over: whoever asks again with fewer steps is told of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import model_validator

from muonlab.registry.cell import Cell
from muonlab.registry.record import Provenance
from muonlab.registry.settings import Closed, Name, Seed


class Retrained(Closed):
    """A recorded run whose first steps were made again by other code."""

    arm: Name
    seed: Seed
    attempt_id: str
    """Of the record."""
    from_code: str
    """Hash of the code that made the record."""
    code: str
    """Hash of the code that made its steps again."""
    steps: int
    """Optimizer steps that were made again."""
    of_steps: int
    """Steps of the recorded run."""
    rows: int
    """Rows of the curve that were compared."""
    weights_compared: bool
    """The final weights were, too: only after all steps."""
    loss_compared: bool
    """The recorded weights were scored again, and scored what the record says."""
    difference: str | None
    """The first thing that is not, bit for bit, as recorded; null where all is."""
    wall_seconds: float
    cost_usd: float


class CarriedCell(Closed):
    """One cell with its digest under the code of its records, and under the code that computes the same."""

    arm: Name
    seed: Seed
    from_code: str
    from_digest: str
    code: str
    digest: str


class Acceptance(Closed):
    """One comparison of code by `muon accept`, and the cells that are carried over by it."""

    kind: Literal["acceptance"] = "acceptance"
    schema_version: Literal[2] = 2
    acceptance_id: str
    """Random, unique across machines."""
    study: Name
    workload: Name
    command: str
    made_at: str
    """UTC, ISO 8601."""
    environment: str
    """Hash of the environment, of the records as of the comparison."""
    provenance: Provenance
    """Commit of the code that was compared, and where that was done."""
    retrained: list[Retrained]
    carried: list[CarriedCell]
    """Empty where a difference was found."""

    @model_validator(mode="after")
    def _carries_what_was_compared(self) -> Acceptance:
        agreed = {(r.arm, r.from_code, r.code) for r in self.retrained if r.difference is None}
        if self.carried and any(r.difference is not None for r in self.retrained):
            raise ValueError("it carries cells over although a difference was found.")
        for cell in self.carried:
            if (cell.arm, cell.from_code, cell.code) not in agreed:
                raise ValueError(f"it carries {cell.arm}-{cell.seed} over without a run of that arm and code.")
        return self

    def evidence(self, cell: CarriedCell) -> Retrained:
        """The run that was made again for a cell that this carries."""
        return next(r for r in self.retrained if (r.arm, r.from_code, r.code) == (cell.arm, cell.from_code, cell.code))


def under_code(cell: Cell, code: str) -> Cell:
    """The same cell under the code with this hash."""
    content = cell.model_dump(mode="json")
    return Cell.model_validate({**content, "inputs": {**content["inputs"], "code": code}})


def older_digests(acceptances: Iterable[Acceptance]) -> dict[str, list[str]]:
    """Digest of a cell -> the digests under other code that were accepted for it, sorted."""
    found: dict[str, set[str]] = {}
    for acceptance in acceptances:
        for cell in acceptance.carried:
            found.setdefault(cell.digest, set()).add(cell.from_digest)
    return {digest: sorted(older) for digest, older in found.items()}


def accepted_after(acceptances: Iterable[Acceptance], digest: str, code: str) -> int | None:
    """After how many compared steps the records of a digest were carried over to `code`; None where they were not."""
    found = [a.evidence(c).steps for a in acceptances for c in a.carried if (c.from_digest, c.code) == (digest, code)]
    return max(found, default=None)


def differences(acceptances: Iterable[Acceptance]) -> dict[tuple[str, str, str], Retrained]:
    """(workload, code of the records, code compared) -> a run that came out otherwise, of several the longest."""
    differing = [(a.workload, run) for a in acceptances for run in a.retrained if run.difference is not None]
    by_length = sorted(differing, key=lambda found: found[1].steps)
    return {(workload, run.from_code, run.code): run for workload, run in by_length}


def mislabelled(acceptances: Iterable[Acceptance], cells: Iterable[Cell]) -> Iterator[str]:
    """Why an acceptance cannot be what `muon accept` wrote, a sentence each: its digests differ in more than code."""
    by_digest = {cell.digest: cell for cell in cells}
    for acceptance in acceptances:
        for carried in acceptance.carried:
            cell = by_digest.get(carried.digest)
            if cell is None:
                continue
            if carried.code != cell.inputs.code or under_code(cell, carried.from_code).digest != carried.from_digest:
                yield (
                    f"cell {carried.arm}-{carried.seed}: the acceptance {acceptance.acceptance_id} carries records "
                    f"over to it ({carried.from_digest[:12]}) that differ in more than their code; it was not written "
                    "by `muon accept`."
                )


def refuted(acceptances: Iterable[Acceptance], digests: set[str]) -> Iterator[str]:
    """Why what was carried over to these digests must not be, a sentence a code: another comparison differed."""
    held = list(acceptances)
    found = differences(held)
    for acceptance in held:
        for cell in acceptance.carried:
            run = found.get((acceptance.workload, cell.from_code, cell.code))
            if run is not None and cell.digest in digests:
                yield (
                    f"cell {cell.arm}-{cell.seed}: carried over to other code ({cell.code[:12]}) after "
                    f"{acceptance.evidence(cell).steps} steps, and another comparison of the two found a difference "
                    f"({run.difference}); go back to the code of the records "
                    f"({cell.from_code[:12]}), or declare a new study (`muon study new`)."
                )
