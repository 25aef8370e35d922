"""Results of training runs from one CSV: a row per run, or per evaluation of a run.

    columns: arm, seed, loss; optionally step, status, cost_usd, seconds; any other column is left alone

The loss of a run is that of its last step, and so are its cost and its seconds, which count from its start. A run whose
losses show divergence (`stats.guardrails.diverged`) is diverged, whatever its status says: trackers call every process
that ended "finished". Rows that repeat each other are one row; rows that contradict each other are refused.
Assumes natural logarithms, nats/token, and lower is better. Every refusal is a `UsageError` that names the line.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from muonlab.registry.errors import UsageError, nearest, unknown_name
from muonlab.stats.guardrails import DIVERGED_EVALUATIONS, DIVERGED_FACTOR, diverged, early_regress
from muonlab.stats.sample import Floats, PairedSample, Run, Status

REQUIRED = ("arm", "seed", "loss")
OPTIONAL = ("step", "status", "cost_usd", "seconds")
COLUMNS = (*REQUIRED, *OPTIONAL)

STATUSES: dict[str, Status] = {
    "completed": "completed",
    "finished": "completed",
    "diverged": "diverged",
    "failed": "failed",
    "crashed": "failed",
    "killed": "failed",
    "abandoned": "failed",
}
"""The words of muonlab's own records, of W&B and of MLflow, in any case."""


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run: steps [E], rising, and losses [E] in nats/token, not finite where they were not."""

    steps: Floats
    losses: Floats


@dataclass(frozen=True)
class Entry:
    """One run of the file; cost [USD] and seconds of the whole run where the file tells them."""

    run: Run
    curve: Curve | None
    cost_usd: float | None
    seconds: float | None


@dataclass(frozen=True)
class Results:
    """The runs of a file by arm, in the file's order, and by seed."""

    path: Path
    entries: Mapping[str, Mapping[int, Entry]]
    diverged_loss: float | None
    """What a diverged run counts with; None where none diverged."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms in the order in which they appear."""
        return tuple(self.entries)

    def of(self, arm: str) -> Mapping[int, Entry]:
        """The runs of one arm by seed; UsageError with the nearest name where there is no such arm."""
        if arm not in self.entries:
            raise unknown_name(str(self.path), "arm", arm, self.arms)
        return self.entries[arm]

    def curves(self, arm: str) -> dict[int, Curve]:
        """Curves of an arm's runs by seed; empty where the file has no steps."""
        return {seed: entry.curve for seed, entry in self.of(arm).items() if entry.curve is not None}

    def common_seeds(self, baseline: str, challenger: str) -> list[int]:
        """Seeds, rising, on which both arms finished (a divergence is an outcome)."""
        base, chal = (
            {seed for seed, entry in self.of(arm).items() if entry.run.status != "failed"}
            for arm in (baseline, challenger)
        )
        return sorted(base & chal)

    def paired(self, baseline: str, challenger: str, *, provenance: Literal["run", "reported"] = "run") -> PairedSample:
        """The runs of two arms as a sample; seeds that only one arm has are in it, for the rule to leave out.

        Curves that end at different steps are an integrity failure of the sample: their last losses are not of the same
        training. The early regress is over the steps that all the paired runs have, up to the end of the shortest.
        """
        seeds = self.common_seeds(baseline, challenger)
        sides = [[self.of(arm)[seed] for seed in seeds] for arm in (baseline, challenger)]
        whole = all(entry.curve is not None for entry in (*sides[0], *sides[1]))
        grid = up_to_the_shortest(*sides) if whole else None
        return PairedSample(
            arm=challenger,
            baseline=tuple(entry.run for entry in self.of(baseline).values()),
            challenger=tuple(entry.run for entry in self.of(challenger).values()),
            provenance=provenance,
            early_regress=None
            if grid is None
            else early_regress(*grid.curves, total_steps=grid.total_steps, diverged_loss=self.diverged_loss),
            integrity_failures=tuple(self._unlike_lengths(baseline, challenger)),
        )

    def _unlike_lengths(self, baseline: str, challenger: str) -> list[str]:
        found = []
        for seed in self.common_seeds(baseline, challenger):
            base, chal = self.of(baseline)[seed], self.of(challenger)[seed]
            if base.curve is None or chal.curve is None or "diverged" in (base.run.status, chal.run.status):
                continue
            ends = base.curve.steps[-1], chal.curve.steps[-1]
            if ends[0] != ends[1]:
                found.append(
                    f"seed {seed}: {baseline} ends at step {ends[0]:g} and {challenger} at step {ends[1]:g}, so that "
                    "their last losses are not of the same training; cut both to the same step, or give the run that "
                    "stopped early the status failed"
                )
        return found


def read_results(
    path: Path, columns: Mapping[str, str] | None = None, *, diverged_loss: float | None = None
) -> Results:
    """Read a CSV of results.

    columns: for each of COLUMNS that the file calls otherwise, the file's name of it, e.g. {"loss": "val/loss"}.
    diverged_loss: given, a run that diverged is kept as such; without it, it is refused, since nothing says what it
    should count with. Raises UsageError on whatever is not such a file.
    """
    where = str(path)
    header, rows = _read_rows(path)
    at = _locate(where, header, dict(columns or {}))
    drafts: dict[str, dict[int, _Draft]] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise UsageError(f"{where}, line {line}: {len(row)} fields where the header has {len(header)}.")
        cell = {name: row[i].strip() for name, i in at.items()}
        if not cell["arm"]:
            raise UsageError(f"{where}, line {line}: the arm is empty; every row needs the name of its arm.")
        seed = _seed(where, line, cell["seed"])
        draft = drafts.setdefault(cell["arm"], {}).setdefault(seed, _Draft(cell["arm"], seed))
        draft.add(where, line, cell)
    if not drafts:
        raise UsageError(f"{where}: a header and no rows; give one row for each run, or for each evaluation of it.")
    entries = {
        arm: {seed: draft.finish(where, diverged_loss) for seed, draft in by_seed.items()}
        for arm, by_seed in drafts.items()
    }
    return Results(path=path, entries=entries, diverged_loss=diverged_loss)


@dataclass(frozen=True)
class CommonGrid:
    """Curves of two arms at the steps [E] that all runs have, and the length of the shortest run that completed."""

    curves: tuple[Floats, Floats, Floats]
    """Steps [E], and losses [S1, E] and [S2, E] of either arm."""
    total_steps: int


def up_to_the_shortest(first: Sequence[Entry], second: Sequence[Entry]) -> CommonGrid | None:
    """Runs of two arms at their common steps, up to the end of the shortest run that completed.

    Runs without a curve are left out. None where an arm has no curve, no run completed or there is no common step.
    """
    sides = [[entry.curve for entry in side if entry.curve is not None] for side in (first, second)]
    ends = [e.curve.steps[-1] for e in (*first, *second) if e.curve is not None and e.run.status == "completed"]
    if not (all(sides) and ends) or (grid := on_common_steps(*sides)) is None:
        return None
    steps, base, chal = grid
    within = steps <= min(ends)
    return CommonGrid(curves=(steps[within], base[:, within], chal[:, within]), total_steps=int(min(ends)))


def on_common_steps(first: Sequence[Curve], second: Sequence[Curve]) -> tuple[Floats, Floats, Floats] | None:
    """The steps [E] that all the curves have, and the losses at them of either group, [S1, E] and [S2, E].

    A run that ended before the others is continued with infinity: it never improved again. None without a common step.
    """
    curves = [*first, *second]
    longest = max(curves, key=lambda curve: curve.steps[-1])
    steps = longest.steps[
        np.all([np.isin(longest.steps, c.steps) | (longest.steps > c.steps[-1]) for c in curves], axis=0)
    ]
    if not steps.size:
        return None
    one, two = (np.array([_continued(curve, steps) for curve in group]) for group in (first, second))
    return steps, one, two


def _continued(curve: Curve, steps: Floats) -> Floats:
    """Losses of a curve at `steps`, each one of its own or after its end."""
    losses = np.full(steps.size, np.inf)
    within = steps <= curve.steps[-1]
    losses[within] = curve.losses[np.searchsorted(curve.steps, steps[within])]
    return losses


@dataclass
class _Row:
    """What one step of a run says, and the line that said it first; None where the cell was empty."""

    line: int
    loss: float | None = None
    cost_usd: float | None = None
    seconds: float | None = None


@dataclass
class _Draft:
    """A run while its rows are read."""

    arm: str
    seed: int
    has_steps: bool = False
    status: Status | None = None
    rows: dict[float, _Row] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"arm {self.arm!r}, seed {self.seed}"

    def add(self, where: str, line: int, cell: dict[str, str]) -> None:
        here = f"{where}, line {line}"
        if text := cell.get("status"):
            status = STATUSES.get(text.lower())
            if status is None:
                raise unknown_name(here, "status", text, STATUSES)
            if self.status not in (None, status):
                raise UsageError(f"{here}: {self.name} is {text!r} here and {self.status!r} above; keep one status.")
            self.status = status
        loss = _loss(here, cell["loss"])
        self.has_steps = "step" in cell
        step = 0.0
        if self.has_steps:
            if not cell["step"]:
                if loss is None:
                    return
                raise UsageError(f"{here}: a loss without a step; every row of a curve needs its step.")
            step = _number(here, "step", cell["step"])
        row = self.rows.setdefault(step, _Row(line))
        for name, value in (
            ("loss", loss),
            *((name, _number(here, name, cell[name])) for name in ("cost_usd", "seconds") if cell.get(name)),
        ):
            known = getattr(row, name)
            if value is None or value == known or (known is not None and math.isnan(value) and math.isnan(known)):
                continue
            if known is not None:
                at_step = f" at step {step:g}" if self.has_steps else ""
                hint = "keep the right one" if self.has_steps else "keep the right one, or name the step with --column"
                raise UsageError(
                    f"{here}: {self.name}{at_step} has {name} {value:g} here and {known:g} in line {row.line}; {hint}."
                )
            setattr(row, name, value)

    def finish(self, where: str, diverged_loss: float | None) -> Entry:
        steps = sorted(self.rows)
        last = self.rows[steps[-1]] if steps else None
        curve = None
        if self.has_steps:
            evaluated = [(step, loss) for step in steps if (loss := self.rows[step].loss) is not None]
            if evaluated:
                curve = Curve(*np.array(evaluated, dtype=np.float64).T)
        status = self.status or "completed"
        if status == "completed" and (last is None or last.loss is None):
            at = f", line {last.line}" if last else ""
            raise UsageError(
                f"{where}{at}: {self.name} ends without a loss; write nan if the run diverged, give it the status "
                "failed if it did, or remove the rows that log no loss."
            )
        # A job that was killed because it diverged is no accident of the machine.
        if diverged([row.loss for _, row in sorted(self.rows.items()) if row.loss is not None]):
            status = "diverged"
        if status == "diverged" and diverged_loss is None:
            raise UsageError(
                f"{where}: {self.name} diverged ({self._why_diverged(curve, last)}), and leaving it out would flatter "
                "its arm; give --diverged-loss, the loss it counts with: ln(vocabulary size)."
            )
        return Entry(
            run=Run(seed=self.seed, status=status, loss=last.loss if status == "completed" and last else None),
            curve=curve,
            cost_usd=last.cost_usd if last else None,
            seconds=last.seconds if last else None,
        )

    def _why_diverged(self, curve: Curve | None, last: _Row | None) -> str:
        for step in sorted(self.rows):
            row = self.rows[step]
            if row.loss is not None and not math.isfinite(row.loss):
                return f"line {row.line}: the loss is {row.loss}"
        if self.status == "diverged" or curve is None:
            return "by its status"
        return f"over {DIVERGED_FACTOR:g} times its lowest loss so far at {DIVERGED_EVALUATIONS} evaluations or more"


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows that are not blank, each with its line number."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give a CSV of results.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", data, 0, 1, "a zero byte")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{path}: not a CSV file in UTF-8; export the results as CSV text.") from None
    if not lines:
        raise UsageError(f"{path}: the file is empty; it needs a header with {', '.join(REQUIRED)}, and rows.")
    return [name.strip() for name in lines[0][1]], lines[1:]


def _locate(where: str, header: list[str], columns: dict[str, str]) -> dict[str, int]:
    """Where each of our columns is in the file; the optional ones only where the file has them."""
    for ours in columns:
        if ours not in COLUMNS:
            raise unknown_name("--column", "column", ours, COLUMNS)
    at: dict[str, int] = {}
    for ours in COLUMNS:
        theirs = columns.get(ours, ours)
        if header.count(theirs) > 1:
            raise UsageError(f"{where}: the column {theirs!r} stands in the header {header.count(theirs)} times.")
        if theirs in header:
            at[ours] = header.index(theirs)
        elif ours in REQUIRED or ours in columns:
            separator = next((f" (are the fields separated by {c!r}? use commas)" for c in ";\t" if c in header[0]), "")
            raise UsageError(
                f"{where}: no column {theirs!r} among {', '.join(header)}{separator}; name the one that holds the "
                f"{ours} with --column {ours}=NAME.{nearest(theirs, header)}"
            )
    return at


def _number(here: str, name: str, text: str) -> float:
    """A finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{here}: {name} is {text!r}; it should be a number, 0 or more.")
    return value


def _seed(where: str, line: int, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # pandas writes whole numbers as 3.0 where a column had gaps.
    if not (value >= 0 and value == math.floor(value) and value < 2**53):
        raise UsageError(f"{where}, line {line}: the seed is {text!r}; it should be a whole number, 0 or more.")
    return int(value)


def _loss(here: str, text: str) -> float | None:
    """A loss above 0, or one that is not finite; None for an empty cell."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(
            f"{here}: the loss is {text!r}; it should be a number, or nan for a run that diverged."
        ) from None
    if value <= 0 and math.isfinite(value):
        raise UsageError(f"{here}: the loss is {text}; a loss in nats/token is above 0.")
    return value
