"""False GO against the number of looks, in studies of a challenger that is no better: docs/figures/error_by_looks.svg.

Looks after every pair from the third on. The plain rule says GO when one-sided p < 0.05 at any look; ours are the rule
of the default plan (`hybrid`), and the same rule without its last threshold (an amended plan: the e-process alone).
Effect 0, min_effect -> 0, normal noise: the hardest null setting.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.stats import t as student

from muonlab.registry.verdict import Verdict
from muonlab.stats.rule import Rule
from muonlab.stats.simulate import looks_of, verdicts

mpl.use("svg")
import matplotlib.pyplot as plt

STUDIES, FIRST, N_MAX, ALPHA = 200_000, 3, 12, 0.05


def ever(rejected: np.ndarray) -> np.ndarray:
    """Share [L] of studies that were rejected at some look up to each, from rejected [S, L]."""
    return np.logical_or.accumulate(rejected, axis=1).mean(axis=0)


def plain_t(d: np.ndarray) -> np.ndarray:
    """The t-test after every pair, for differences d [S, n]."""
    n = np.arange(1, N_MAX + 1)
    mean, squares = d.cumsum(axis=1) / n, (d**2).cumsum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean * np.sqrt(n * (n - 1) / (squares - n * mean**2))
        return ever((t >= student.ppf(1 - ALPHA, n - 1))[:, FIRST - 1 :])


def ours(d: np.ndarray, *, amended: bool) -> np.ndarray:
    """The rule after every pair, as `muon` decides."""
    rule = Rule(min_effect=1e-9, min_effect_unit="nats", n_min=FIRST, n_max=N_MAX, amended=amended)
    said = verdicts(d[:, :, np.newaxis], 0.0, rule, looks_of(rule, N_MAX), family_size=1)
    return ever(said[:, :, 0] == Verdict.GO.value)


def main() -> None:
    """Simulate and draw."""
    d = np.random.default_rng(1).standard_normal((STUDIES, N_MAX))
    pairs = np.arange(FIRST, N_MAX + 1)
    lines = (
        ("t-test after every pair", plain_t(d), "-", "#b2182b"),
        ("default plan (e-process, t* with the last pair)", ours(d, amended=False), "-", "#2166ac"),
        ("amended plan (e-process alone)", ours(d, amended=True), "--", "#2166ac"),
    )
    plt.rcParams |= {"svg.hashsalt": "muonlab", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.axhline(100 * ALPHA, color="0.5", linewidth=1, linestyle=":")
    axes.text(FIRST + 1.4, 100 * ALPHA + 0.3, "promised: 5%", color="0.35", fontsize=10)
    for label, rate, style, colour in lines:
        axes.plot(pairs, 100 * rate, style, color=colour, marker="o", markersize=4)
        axes.annotate(
            f"{label}: {100 * rate[-1]:.1f}%",
            (pairs[-1], 100 * rate[-1]),
            xytext=(0, 7 if rate[-1] != lines[2][1][-1] else -14),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
        print(f"{label}: {', '.join(f'{n}: {r:.2%}' for n, r in zip(pairs, rate, strict=True))}")
    axes.set(
        xlabel="pairs, with a look after each from the third on",
        ylabel="studies that have said GO wrongly [%]",
        ylim=(-0.4, 18),
        xticks=pairs,
        yticks=range(0, 20, 5),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
