"""Where everything lies.

Two roots: `root` is the tree that is being run (a temporary copy under `dvc exp run --temp` and in the queue);
`main` is the repository itself, where the ledger, the scratch folders and mlflow.db live. DVC names the second
in `DVC_ROOT`; outside DVC they are the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from muonlab.registry.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """Paths of one repository (see the module's text for the two roots)."""

    root: Path
    main: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Layout:
        """Find the repository that holds `start` (the current folder by default).

        Raises UsageError outside of one.
        """
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
                named = os.environ.get("DVC_ROOT")
                main = Path(named).resolve() if named and _is_copy_of(folder, Path(named)) else folder
                return cls(root=folder, main=main)
        raise UsageError(f"{here}: no params.yaml and dvc.yaml here or above; run this inside the repository.")

    @property
    def params(self) -> Path:
        """The file of named optimizers, workloads and the one cell."""
        return self.root / "params.yaml"

    @property
    def ledger(self) -> Path:
        """The one ledger of all studies."""
        return self.main / "experiments" / "ledger.jsonl"

    @property
    def scratch(self) -> Path:
        """One folder a cell digest: attempts, checkpoints, bundles that wait to be adopted."""
        return self.main / "scratch"

    def study(self, slug: str) -> Path:
        """Folder of a study's declaration."""
        return self.root / "experiments" / slug

    def reports(self, slug: str) -> Path:
        """Folder of a study's results."""
        return self.root / "reports" / slug

    def runs(self, slug: str) -> Path:
        """Folder of a study's cells."""
        return self.root / "runs" / slug

    def data(self, workload: str) -> Path:
        """Prepared tokens of a workload."""
        return self.root / "data" / workload

    def fingerprint(self, arm: str) -> Path:
        """Hashes of the code and environment of an optimizer named in params.yaml."""
        return self.root / "data" / "fingerprint" / f"{arm}.json"


def _is_copy_of(folder: Path, main: Path) -> bool:
    """Whether `folder` lies in the folder where DVC keeps its temporary copies of `main`."""
    return folder.is_relative_to(main.resolve()) and (main / "params.yaml").is_file()
