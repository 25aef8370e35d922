"""Where a tuning study stands: every arm's losses over the grid, what was chosen, and how far to trust the choice.

    L_ps   = final validation loss at grid point p with seed s; of a diverged run ln(vocabulary size)   [nats/token]
    mean_p = sum_s L_ps / n                                         over all n declared seeds, or none
    chosen = the point with the lowest mean_p; of equals, the first declared
    close  = { p : mean_s(L_ps - L_chosen,s) < sd_s(L_ps - L_chosen,s) }     sd with n - 1; a coin toss

The differences are taken on the same seed, which has the same initial weights and data order at every point. Nothing is
chosen before every declared run has an outcome, so that no arm is tuned with fewer runs than another, and nothing for
an arm whose best point diverged on every seed. Nothing is tested: the least of noisy means lies below its own
expectation, so that a chosen mean is no estimate of what a comparison will find.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

from muonlab.registry.settings import Closed, WorkloadSettings
from muonlab.registry.study import Role, Study
from muonlab.reporting.standing import CellState

Options = dict[str, Any]


class GridRun(Closed):
    """One declared run: an arm at a point of the grid with a seed."""

    arm: str
    options: Options
    """The point of the grid."""
    seed: int
    digest: str
    """Empty where the cell could not be resolved and has no result."""
    state: CellState
    val_loss: float | None
    """Final validation loss; null unless completed."""
    attempts: int
    wall_seconds: float
    """Over all attempts."""
    cost_usd: float
    """Over all attempts."""
    error: str | None = None

    @property
    def has_outcome(self) -> bool:
        """Whether it ended with a loss, or diverged, which is an outcome too."""
        return self.state in ("completed", "diverged")


class PointResult(Closed):
    """One point of the grid, of one arm."""

    options: Options
    losses: list[float | None]
    """Seed by seed as declared; a diverged run counts with the diverged loss; null: no outcome."""
    diverged: list[int]
    """Seeds."""
    mean: float | None
    """Over all seeds; null where one has no outcome."""


class Edge(Closed):
    """An option whose chosen value is the smallest or the largest that was tried."""

    option: str
    value: float
    side: Literal["smallest", "largest"]
    next_value: float | None
    """One more step of the grid in that direction; null where the option does not allow that value."""


class Close(Closed):
    """A point that is nearer to the chosen one than the seeds can tell."""

    options: Options
    gap: float
    """Mean over the seeds of its loss minus the chosen one's on the same seed."""
    spread: float
    """Standard deviation of these differences."""


class ArmResult(Closed):
    """What was found for one arm."""

    arm: str
    role: Role
    declared: int
    runs: int
    """With an outcome."""
    points: list[PointResult]
    """In the order of the grid."""
    chosen: int | None
    """Index into `points`."""
    why_none: str | None = None
    """Why nothing is chosen."""
    edges: list[Edge] = []
    close: list[Close] = []

    @property
    def choice(self) -> PointResult | None:
        """The chosen point."""
        return None if self.chosen is None else self.points[self.chosen]


class TuningStanding(Closed):
    """All that is known of a tuning study; every number of its report."""

    schema_version: Literal[1] = 1
    study: Study
    settings: WorkloadSettings
    source: Literal["ledger", "results.csv"]
    made_under: str
    """Of results.csv: what is known of the code that made its runs, as a clause; else empty."""
    runs: list[GridRun]
    arms: list[ArmResult]
    in_params: dict[str, Literal["committed", "uncommitted", "other"]]
    """Arm -> whether params.yaml holds what was chosen for it: in the last commit, here only, or other values."""
    used_by: list[str]
    """Comparisons, rehearsals included, that name this study as their tuning."""
    registration: str | None
    registered_at: str | None
    made_on: list[str]
    """Commit, device and versions of the runs that count, each once; empty where only results.csv is known."""
    findings: list[str]
    """Evidence that contradicts itself."""
    notes: list[str]
    total_seconds: float
    total_cost_usd: float
    lost_seconds: float
    """Spent on attempts that did not become an outcome."""
    lost_cost_usd: float

    @property
    def complete(self) -> bool:
        """Every declared run has an outcome."""
        return all(run.has_outcome for run in self.runs)


def spell_options(options: Options) -> str:
    """`lr 0.01, momentum 0.9`."""
    return ", ".join(f"{option} {value}" for option, value in options.items())


def numbers(values: Sequence[object]) -> list[float] | None:
    """The values if all are numbers (a truth value is none), else None."""
    found = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return found if len(found) == len(values) else None


def judge_arm(
    study: Study,
    arm: str,
    runs: Sequence[GridRun],
    *,
    diverged_loss: float,
    complete: bool,
    allowed: Callable[[Options], bool] = lambda options: True,
) -> ArmResult:
    """What the runs of one arm say; `runs`: every declared one, `complete`: all arms' have an outcome.

    `allowed` says whether the arm can be built with these options: a grid that ends where an option ends has no edge.
    """
    points = []
    for options in [run.options for run in runs if run.seed == study.seeds[0]]:
        of_point = {run.seed: run for run in runs if run.options == options}
        losses = [_loss(of_point[seed], diverged_loss) for seed in study.seeds]
        known = [loss for loss in losses if loss is not None]
        points.append(
            PointResult(
                options=options,
                losses=losses,
                diverged=[seed for seed in study.seeds if of_point[seed].state == "diverged"],
                mean=math.fsum(known) / len(known) if len(known) == len(losses) else None,
            )
        )
    found = ArmResult(
        arm=arm,
        role=study.role(arm),
        declared=len(runs),
        runs=sum(run.has_outcome for run in runs),
        points=points,
        chosen=None,
    )
    if not complete:
        return found.model_copy(update={"why_none": "not every declared run has an outcome"})
    best = min(range(len(points)), key=lambda i: points[i].mean or math.inf)
    if points[best].diverged == study.seeds:
        return found.model_copy(update={"why_none": "its best point diverged on every seed"})
    return found.model_copy(
        update={
            "chosen": best,
            "edges": _edges(study, points[best].options, allowed),
            "close": _close(points, points[best]),
        }
    )


def _loss(run: GridRun, diverged_loss: float) -> float | None:
    return diverged_loss if run.state == "diverged" else run.val_loss


def _edges(study: Study, chosen: Options, allowed: Callable[[Options], bool]) -> list[Edge]:
    found = []
    for option, values in study.grid.items():
        tried = sorted(set(numbers(values) or []))
        if len(tried) < 2:
            continue
        value = float(chosen[option])
        sides: tuple[tuple[Literal["smallest", "largest"], float, float], ...] = (
            ("smallest", tried[0], tried[1]),
            ("largest", tried[-1], tried[-2]),
        )
        for side, end, inner in sides:
            if value != end:
                continue
            whole = all(isinstance(v, int) for v in values)
            sign = -1 if side == "smallest" else 1
            # The least that lies beyond: where even that is not allowed, the option ends here and not the grid.
            beyond = int(end) + sign if whole else end + sign * 1e-9 * max(1e-9, abs(end))
            if not allowed({**chosen, option: beyond}):
                continue
            step = _extrapolated(end, inner, whole=whole)
            fits = allowed({**chosen, option: int(step) if whole else step})
            found.append(Edge(option=option, value=end, side=side, next_value=step if fits else None))
    return found


def _extrapolated(end: float, inner: float, *, whole: bool) -> float:
    """One more step of the grid: by the last ratio between positive values, else by the last difference."""
    step = end * end / inner if end > 0 and inner > 0 else 2 * end - inner
    if not whole:
        return float(f"{step:.3g}")
    rounded = round(step)
    return float(rounded if rounded != end else end + math.copysign(1, end - inner))


def _close(points: Sequence[PointResult], best: PointResult) -> list[Close]:
    if len(best.losses) < 2:
        return []  # one seed has no spread; the report says so
    found = []
    for point in points:
        if point is best:
            continue
        differences = [a - b for a, b in zip(point.losses, best.losses, strict=True) if a is not None and b is not None]
        gap, spread = statistics.fmean(differences), statistics.stdev(differences)
        # Equal losses differ in nothing that could be chosen.
        if gap < spread or gap == 0:
            found.append(Close(options=point.options, gap=gap, spread=spread))
    return found
