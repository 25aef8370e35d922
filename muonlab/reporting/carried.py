"""What a report says of runs that were made by other code and carried over by `muon accept`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from muonlab.registry.acceptance import Acceptance, Retrained
from muonlab.reporting.wording import count, duration, listed, moment


def compared_text(retrained: Sequence[Retrained]) -> str:
    """What was compared, with what came out, and what was not compared; of comparisons without a difference."""
    by_length: dict[str, list[str]] = {}
    for run in retrained:
        by_length.setdefault(_steps(run), []).append(f"{run.arm}-{run.seed}")
    parts = [f"{steps} of {listed(names)}" for steps, names in by_length.items()]
    rows = count(sum(run.rows for run in retrained), "row")
    also = ["the order of all batches"]
    if any(run.weights_compared for run in retrained):
        also.append("the final weights")
    if any(run.loss_compared for run in retrained):
        also.append("the loss of the final weights")
    cut = any(run.steps < run.of_steps for run in retrained)
    unseen = "in other cells, or after these steps," if cut else "in other cells"
    return (
        f"{listed(parts)} were trained again by the code that there is now, and came out as recorded, bit for bit: "
        f"{rows} of the curves, {listed(also)}. What acts only {unseen} was not compared."
    )


def _steps(run: Retrained) -> str:
    return f"all {run.steps} steps" if run.steps == run.of_steps else f"the first {run.steps} of {run.of_steps} steps"


def carried_notes(acceptances: Iterable[Acceptance], digests: set[str]) -> list[str]:
    """A sentence for each acceptance by which runs of these cells count."""
    found = []
    for acceptance in acceptances:
        cells = [cell for cell in acceptance.carried if cell.digest in digests]
        codes = {(cell.arm, cell.from_code) for cell in cells}
        retrained = [run for run in acceptance.retrained if (run.arm, run.from_code) in codes]
        names = ", ".join(dict.fromkeys(f"{cell.arm}-{cell.seed}" for cell in cells))
        commit = acceptance.provenance.commit
        at = f", at commit {commit[:12]}" if commit else ""
        found.append(
            f"carried over from other code, not trained by that of now: {names} (`{acceptance.command}`, "
            f"{moment(acceptance.made_at)}{at}): {compared_text(retrained)} "
            f"The comparison took {duration(sum(run.wall_seconds for run in retrained))}, which this study is not "
            "charged."
        )
    return found
