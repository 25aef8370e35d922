"""Part-runs: some cells of a study are trained here, and others elsewhere.

    muon study run 010-x --only 'muon-*'

trains the chosen cells and brings them into DVC, so that `dvc push` shares them. The report is made of what
there is and names what is missing; whoever has all cells in place or in the run cache concludes the study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from muonlab.pipeline import doors
from muonlab.pipeline.conclude import evaluate_into
from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import UsageError, nearest
from muonlab.registry.study import Study
from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import count, listed

MOST_NAMED = 12
"""A sentence names at most as many cells."""


def chosen_cells(study: Study, only: Sequence[str]) -> list[str]:
    """Keys (`<arm>-<seed>`) of the declared cells that these shell patterns choose; without a pattern, all of them.

    Raises UsageError for a pattern that no cell matches, and on a study that is not a comparison that was run here.
    """
    keys = [f"{arm}-{seed}" for seed in study.seeds for arm in study.arms]
    if not only:
        return keys
    if study.kind != "comparison" or study.provenance != "run":
        what = "a tuning study, of which DVC keeps no cell" if study.kind == "tuning" else "reported by others"
        raise UsageError(f"--only: {study.slug} is {what}; leave the option out.")
    for pattern in only:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise UsageError(
                f"--only: {pattern!r} matches no cell of {study.slug}; a cell is named <arm>-<seed>, with the arms "
                f"{listed(study.arms)} and the seeds {listed(study.seeds)}.{nearest(pattern, keys)}"
            )
    return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in only)]


def take_over(layout: Layout, study: Study, keys: Iterable[str]) -> None:
    """Bring these cells, trained here or restorable, into DVC, and score the weights that are in place then.

    Raises CellsFailedError where DVC fails.
    """
    grid = f"experiments/{study.slug}/dvc.yaml"
    targets = [f"{grid}:train@{key}" for key in keys]
    if targets:
        doors.dvc(layout, "repro", *targets)
    evaluate_into(layout, study.slug)


def left_text(standing: Standing, left: Sequence[str]) -> str:
    """Of the cells that a part-run has left out, which ones nobody is known to have trained."""
    slug = standing.snapshot.study.slug
    known = {f"{c.arm}-{c.seed}" for c in standing.cells if c.state in ("completed", "diverged")}
    lacking = [key for key in left if key not in known]
    if not lacking:
        return (
            f"{slug}: the ledger has the results of the {count(len(left), 'cell')} left out here, whose outputs are "
            f"elsewhere; `muon download --run '{slug}/*'` brings them, and `muon study run {slug}` concludes."
        )
    more = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
    return (
        f"{slug}: {count(len(lacking), 'cell')} left to be trained elsewhere, or by `muon study run {slug}`: "
        f"{', '.join(lacking[:MOST_NAMED])}{more}."
    )
