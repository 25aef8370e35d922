"""Paired runs of one challenger and the baseline over shared seeds, by intention to treat.

    d_i = baseline_i - challenger_i      [nats/token; positive = challenger better]

A diverged run counts with the rule's diverged loss, ln(vocabulary size), so that divergence costs; where both
runs of a seed diverged, d = 0. Seeds that only one arm has are listed and left out, never compared unpaired.
Assumes seed i gave both arms the same initial weights and data order; the caller reports what contradicts it
in `integrity_failures`.
Source of the principle: intention to treat, ICH E9 (1998), section 5.2.1.
"""

from dataclasses import dataclass
from math import fsum
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from muonlab.stats.rule import Rule

Floats = NDArray[np.float64]
Status = Literal["completed", "diverged", "failed"]

LARGEST_UNPAIRED_SHARE = 0.2  # of the seeds that either arm has: more is a selection, not an accident
IDENTICAL_RELATIVE_SD = 1e-12  # of the largest loss: above float64 noise, far below training noise


def moments(d: Floats) -> tuple[float, float]:
    """Mean of d [n] and the sum of squared deviations from it; nan, nan for n = 0.

    Correctly rounded sums: the order of the pairs cannot change a digit of a verdict.
    """
    if d.size == 0:
        return float("nan"), float("nan")
    mean = fsum(d) / d.size
    return mean, fsum((d - mean) ** 2)


class Run(BaseModel):
    """One run's end: its final validation loss [nats/token], or that it diverged or failed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0)]
    loss: float | None = None
    status: Status = "completed"

    @model_validator(mode="after")
    def _completed_has_a_loss(self) -> Self:
        if self.status == "completed" and self.loss is None:
            raise ValueError(
                f"run of seed {self.seed}: completed without a loss; give its finite final loss, or its "
                "status: diverged or failed"
            )
        return self


class PairedSample(BaseModel):
    """The runs of one challenger and of the baseline, in any order; pairs are made by seed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arm: str
    baseline: tuple[Run, ...]
    challenger: tuple[Run, ...]
    provenance: Literal["run", "reported"] = "run"
    early_regress: float | None = None
    """Largest early regress as a fraction (`guardrails.early_regress`); None where no curves were given."""
    missing_cells: tuple[str, ...] = ()
    """Sentences from the caller, one for each declared run that has not been made among the seeds so far."""
    integrity_failures: tuple[str, ...] = ()
    """Sentences from the caller, e.g. a data digest that differs between the arms."""

    @classmethod
    def of(
        cls,
        arm: str,
        baseline: "list[float] | Floats",
        challenger: "list[float] | Floats",
        *,
        provenance: Literal["run", "reported"] = "run",
        early_regress: float | None = None,
    ) -> Self:
        """Completed runs on seeds 0, 1, ...; losses [n] in nats/token."""
        if len(baseline) != len(challenger):
            raise ValueError(
                f"arm '{arm}': {len(challenger)} losses against {len(baseline)} of the baseline; give one "
                "per seed for each"
            )
        return cls(
            arm=arm,
            baseline=tuple(Run(seed=i, loss=float(loss)) for i, loss in enumerate(baseline)),
            challenger=tuple(Run(seed=i, loss=float(loss)) for i, loss in enumerate(challenger)),
            provenance=provenance,
            early_regress=early_regress,
        )


@dataclass(frozen=True)
class Pairs:
    """What a rule uses of a sample: n pairs in seed order, and everything that was wrong or left out.

    baseline, challenger: [n] losses with intention to treat; diverged flags: [n]; sentences in `invalid`,
    `incomplete` and `notes`.
    """

    arm: str
    seeds: tuple[int, ...]
    baseline: Floats
    challenger: Floats
    baseline_diverged: NDArray[np.bool_]
    challenger_diverged: NDArray[np.bool_]
    margin: float
    unpaired_seeds: tuple[int, ...]
    unused_seeds: tuple[int, ...]
    invalid: tuple[str, ...]
    incomplete: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.seeds)

    @property
    def d(self) -> Floats:
        """Differences [n], positive = challenger better; exactly 0 where both runs diverged."""
        return self.baseline - self.challenger

    @property
    def rel_pct(self) -> Floats:
        """100 d_i / baseline_i [n], percent of the baseline's loss on the same seed."""
        return np.asarray(100 * self.d / self.baseline)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean of d, and the sum of squared deviations from it; nan, nan without pairs."""
        return moments(self.d)


def _by_seed(side: str, runs: tuple[Run, ...], invalid: list[str]) -> dict[int, Run]:
    """One run per seed: equal duplicates are one row, different ones are an integrity failure."""
    kept: dict[int, Run] = {}
    for run in runs:
        if run.seed in kept and kept[run.seed] != run:
            first = kept[run.seed]
            invalid.append(
                f"{side}, seed {run.seed}: two records with different values "
                f"({first.status} {first.loss} and {run.status} {run.loss})"
            )
        kept.setdefault(run.seed, run)
    return kept


def _loss(arm: str, run: Run, rule: Rule) -> float:
    if run.status == "completed":
        assert run.loss is not None  # Run refuses a completed run without one
        return run.loss
    if rule.diverged_loss is None:
        raise ValueError(
            f"arm '{arm}', seed {run.seed}: the run diverged and the rule has no diverged_loss; declare the "
            "loss a diverged run counts with, ln(vocabulary size)"
        )
    return rule.diverged_loss


def _seed_list(seeds: "tuple[int, ...] | list[int]") -> str:
    return ", ".join(str(seed) for seed in seeds)


def pair(sample: PairedSample, rule: Rule) -> Pairs:
    """Pair by seed under the rule.

    Raises ValueError where a run diverged and the rule has no diverged loss.
    """
    invalid = list(sample.integrity_failures)
    incomplete = list(sample.missing_cells)
    notes: list[str] = []
    base = _by_seed("baseline", sample.baseline, invalid)
    chal = _by_seed(sample.arm, sample.challenger, invalid)

    failed = {
        side: sorted(seed for seed, run in runs.items() if run.status == "failed")
        for side, runs in (("baseline", base), (sample.arm, chal))
    }
    finished_base = {seed for seed, run in base.items() if run.status != "failed"}
    finished_chal = {seed for seed, run in chal.items() if run.status != "failed"}
    paired = sorted(finished_base & finished_chal)
    unpaired = tuple(sorted((set(base) | set(chal)) - set(paired)))

    _check_failures(failed, rule, invalid, incomplete)
    # A failed cell is already reported as a failure; the share counts what is missing without a word.
    silent = [seed for seed in unpaired if not any(seed in seeds for seeds in failed.values())]
    # A caller that names its missing cells has a declared grid, and waits for them instead.
    if not sample.missing_cells and len(silent) > LARGEST_UNPAIRED_SHARE * len(set(base) | set(chal)):
        invalid.append(
            f"seeds {_seed_list(silent)} are in one arm only: {len(silent)} of {len(set(base) | set(chal))}, "
            f"more than {LARGEST_UNPAIRED_SHARE:.0%}; run the missing cells, an unpaired test is not offered"
        )
    if unpaired:
        notes.append(f"unpaired seeds, left out: {_seed_list(unpaired)}")

    limit = rule.pairs_used_at_most()
    if rule.plan == "sequential":
        first = rule.first_seed
        in_order = [seed for seed in paired if first <= seed < first + rule.n_max]
        gap = [seed for seed in range(first, in_order[-1] + 1 if in_order else first) if seed not in in_order]
        if gap:
            incomplete.append(
                f"a sequential plan uses seeds in order, and seeds {_seed_list(gap)} are missing before seed "
                f"{in_order[-1]}; run them"
            )
        used = in_order
    else:
        used = paired[:limit]
        if isinstance(rule.fixed_n, int) and len(used) < rule.fixed_n:
            incomplete.append(
                f"the fixed plan looks once, at {rule.fixed_n} pairs, and {len(used)} are complete; run the "
                f"missing {rule.fixed_n - len(used)}"
            )
    unused = tuple(seed for seed in paired if seed not in used)
    if unused:
        notes.append(f"seeds beyond the plan, left out: {_seed_list(unused)}")
    if not used and not invalid and not incomplete:
        incomplete.append("no seed is finished in both arms")

    baseline = np.array([_loss("baseline", base[seed], rule) for seed in used])
    challenger = np.array([_loss(sample.arm, chal[seed], rule) for seed in used])
    baseline_diverged = np.array([base[seed].status == "diverged" for seed in used], dtype=bool)
    challenger_diverged = np.array([chal[seed].status == "diverged" for seed in used], dtype=bool)
    invalid += _suspect(sample.arm, baseline, challenger, baseline_diverged & challenger_diverged)
    return Pairs(
        arm=sample.arm,
        seeds=tuple(used),
        baseline=baseline,
        challenger=challenger,
        baseline_diverged=baseline_diverged,
        challenger_diverged=challenger_diverged,
        margin=margin_of(rule, baseline, baseline_diverged),
        unpaired_seeds=unpaired,
        unused_seeds=unused,
        invalid=tuple(invalid),
        incomplete=tuple(incomplete),
        notes=tuple(notes),
    )


def _check_failures(failed: dict[str, list[int]], rule: Rule, invalid: list[str], incomplete: list[str]) -> None:
    """Failed cells wait for their rerun in a sequential plan; a fixed plan may leave out equally many."""
    counts = [len(seeds) for seeds in failed.values()]
    if not any(counts):
        return
    listed = "; ".join(f"{side}: seeds {_seed_list(seeds)}" for side, seeds in failed.items() if seeds)
    if rule.plan == "sequential":
        incomplete.append(f"failed cells ({listed}); rerun them on the same seed, leaving them out would bias the test")
    elif counts[0] != counts[1]:
        invalid.append(f"unequal failures between the arms ({listed}): what is left is a selection")


def _suspect(arm: str, baseline: Floats, challenger: Floats, both_diverged: NDArray[np.bool_]) -> list[str]:
    n = len(baseline)
    if n == 0:
        return []
    if both_diverged.all():
        return (
            [f"every run of both arms diverged ({n} pairs): the workload is broken and nothing can be compared"]
            if n > 1
            else []
        )
    d = baseline - challenger
    if (d == 0).all():
        return [
            f"suspect: '{arm}' and the baseline ended with identical losses in all {n} pairs; did the arm do anything?"
        ]
    scale = max(np.abs(baseline).max(), np.abs(challenger).max())
    if n > 1 and d.std(ddof=1) <= IDENTICAL_RELATIVE_SD * scale:
        return [
            f"suspect: the difference to '{arm}' is the same {d[0]:.6g} in all {n} pairs (s = 0); training "
            "noise never is"
        ]
    return []


def margin_of(rule: Rule, baseline: Floats, diverged: NDArray[np.bool_]) -> float:
    """min_effect in nats/token. A percentage is taken of the runs that converged: divergence must not widen
    it."""
    if rule.min_effect_unit == "nats":
        return rule.min_effect
    converged = baseline[~diverged] if not diverged.all() else baseline
    return float(rule.min_effect / 100 * converged.mean()) if converged.size else float("nan")
