"""Whether a study can come to a GO with the pairs that its budget and its plan allow.

earliest GO    max(n_min, the first n at which E can reach K / alpha), or else the last look of the plan, whose
               t-test decides too; K: its challengers (muonlab.stats.decision.earliest_go, as in the report)
pairs          the seeds, in order, whose missing runs of all arms together cost no more than is left of the budget
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from muonlab.pipeline.price import Pace
from muonlab.registry.study import Study
from muonlab.reporting.wording import count


def pairs_paid_for(
    study: Study, pace: Pace, steps: int, to_train: Iterable[tuple[str, int]], *, left_usd: float
) -> int | None:
    """How many pairs of every challenger there will be when `left_usd` is spent, those at hand included.

    `to_train`: (arm, seed) of the declared runs that are missing. None where no budget holds, the pace is unknown, or
    the study compares nothing.
    """
    if study.kind != "comparison" or study.price_usd_per_gpu_hour == 0:
        return None
    costs = {arm: pace.price(study, [arm], steps).cost_usd for arm in study.arms}
    missing = set(to_train)
    spent = 0.0
    pairs = 0
    for seed in study.possible_seeds:
        of_seed = [costs[arm] for arm in study.arms if seed not in study.seeds or (arm, seed) in missing]
        known = [cost for cost in of_seed if cost is not None]
        if len(known) < len(of_seed):
            return None
        spent += math.fsum(known)
        if spent > left_usd and not math.isclose(spent, left_usd):
            break
        pairs += 1
    return pairs


def go_notes(study: Study, pairs_paid: int | None, *, amended: bool) -> Iterator[str]:
    """What keeps a comparison from a GO, or puts it off to the last look, whatever its runs come to."""
    from muonlab.stats.decision import earliest_go
    from muonlab.stats.evidence import first_attainable_n
    from muonlab.stats.rule import Rule

    declared = study.decision
    if study.kind != "comparison" or declared is None or study.twin_of is not None:
        return
    level = declared.alpha / len(study.challengers)
    fixed = None if declared.plan == "sequential" else declared.plan.fixed
    rule = Rule(
        min_effect=1.0,  # of no influence on when a GO can be reached
        min_effect_unit="nats",
        alpha=declared.alpha,
        plan="sequential" if fixed is None else "fixed",
        fixed_n=fixed,
        n_min=declared.n_min,
        n_max=declared.n_max,
        g=declared.g,
        amended=amended,
    )
    first = earliest_go(rule, level)
    by_evidence = max(declared.n_min, first_attainable_n(level, declared.g))
    if fixed is None and by_evidence > declared.n_max:
        then = "no GO is possible, since the plan is amended" if amended else "only its last look can, by a t-test"
        yield (
            f"Warning: by its E-value the earliest possible GO is at {count(by_evidence, 'pair')}, and the plan ends "
            f"at {declared.n_max}: {then}."
        )
    if pairs_paid is not None and first is not None and first > pairs_paid:
        yield (
            f"Warning: the budget pays for {count(pairs_paid, 'pair')}; the earliest possible GO is at "
            f"{count(first, 'pair')}: no GO is possible within the budget."
        )
