"""The price of picking the best of K arms on some seeds and reporting it on the same seeds.

    bias = run_sd / sqrt(n) * E[max of K standard normals]        for K arms that are all the same in truth

A pick is confirmed on seeds that were not used to pick it; pooling both gave 11 % false GO at alpha 5 %.
Assumes arms of one run-sd and independent runs; with true differences between the arms the bias is smaller.
Source: order statistics of the normal, e.g. David and Nagaraja, Order Statistics (2003), section 4.5.
"""

from collections.abc import Collection

import numpy as np

from muonlab.stats.result import Result


class SelectionNote(Result):
    """How far the best of K arms is expected to be overrated, and whether its confirmation is independent."""

    arms: int
    seeds: int
    bias_run_sd: float
    """Expected excess of the pick over its true value, in sd of a single run, if all arms are the same."""
    reused_seeds: tuple[int, ...]
    sentence: str


def expected_maximum(k: int) -> float:
    """E[max of k independent standard normals]."""
    from scipy.integrate import quad
    from scipy.special import ndtr

    def upper_minus_lower(x: float) -> float:
        return float(1 - ndtr(x) ** k - ndtr(-x) ** k)

    return float(quad(upper_minus_lower, 0, 12)[0])


def selection_note(arms: int, picking_seeds: Collection[int], confirming_seeds: Collection[int]) -> SelectionNote:
    """What picking the best of `arms` on some seeds is worth, and whether the confirming seeds are others.

    Raises ValueError for fewer than two arms or no picking seeds: nothing was selected.
    """
    if arms < 2 or not picking_seeds:
        raise ValueError(
            f"selection: {arms} arms on {len(picking_seeds)} seeds; a selection needs at least two arms and one seed"
        )
    n = len(set(picking_seeds))
    bias = expected_maximum(arms) / np.sqrt(n)
    reused = tuple(sorted(set(picking_seeds) & set(confirming_seeds)))
    sentence = f"the best of {arms} arms picked on {n} seeds is overrated by {bias:.2f} run-sd if the arms are the same"
    if reused:
        sentence += f"; seeds {', '.join(map(str, reused))} picked it and cannot confirm it"
    elif not confirming_seeds:
        sentence += "; confirm it on seeds that did not pick it"
    return SelectionNote(arms=arms, seeds=n, bias_run_sd=float(bias), reused_seeds=reused, sentence=sentence)
