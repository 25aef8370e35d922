"""A cell: one (workload, arm, seed), resolved to every input that can change its result.

    digest = SHA-256 of the canonical JSON of {settings, optimizer, seed, inputs}

The names of workload and arm are not part of it: two names for the same computation are one cell, and a name
that comes to mean another computation is another cell.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from muonlab.registry.canonical import sha256_of
from muonlab.registry.settings import Closed, Name, Seed, WorkloadSettings


class OptimizerSpec(Closed):
    """The kind of an optimizer (its file in `optim/`) with all its options, defaults filled in."""

    kind: Name
    options: dict[str, Any]


class Inputs(Closed):
    """Hashes (SHA-256) of what a cell reads besides its parameters."""

    data: str
    tokenizer: str
    code: str
    """The trainer, the core of `optim/` and this optimizer's own file, parsed, without comments and docstrings."""
    environment: str
    """Versions of Python and the numerical libraries, and the kind of device."""
    model: str = ""
    """What is read of a model that others have made (a package: its version); empty where the settings tell all."""


class Cell(Closed):
    """One run to be made or found: what it is called and what it computes."""

    workload: Name
    arm: Name
    seed: Seed
    settings: WorkloadSettings
    optimizer: OptimizerSpec
    inputs: Inputs

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that can change the result of this cell."""
        content = self.model_dump(mode="json", exclude={"workload", "arm"})
        if not self.inputs.model:
            del content["inputs"]["model"]  # so that a cell without it keeps the digest that it has in older records
        return sha256_of(content)

    @property
    def key(self) -> str:
        """Folder name of the cell inside its study: `<arm>-<seed>`."""
        return f"{self.arm}-{self.seed}"
