"""What the diagnostics of experiments/002-nolah-parts-tiny show: docs/figures/hypotheses.svg, and the numbers as text.

Reads runs/002-nolah-parts-tiny/<arm>-<seed>/curve.csv, so `muon study run 002-nolah-parts-tiny` comes first. A line is
the mean over seeds, its band the range.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STUDY = "002-nolah-parts-tiny"
STYLES = {
    "muon": ("black", "-"),
    "nolah": ("#b2182b", "-"),
    "nolah-gate": ("#d6604d", "--"),
    "nolah-damp": ("#f4a582", "-."),
    "nolah-project": ("#7f7f7f", ":"),
    "nolah-annealed": ("#67001f", "--"),
    "orthonoise": ("#2166ac", "-"),
    "isotropic": ("#67a9cf", "--"),
}
PARTS = ("nolah", "nolah-gate", "nolah-damp", "nolah-project")


def curves(root: Path) -> pd.DataFrame:
    """All rows of all runs, with columns arm and seed."""
    found = []
    for path in sorted((root / "runs" / STUDY).glob("*/curve.csv")):
        arm, _, seed = path.parent.name.rpartition("-")
        found.append(pd.read_csv(path).assign(arm=arm, seed=int(seed)))
    if not found:
        sys.exit(f"runs/{STUDY}: no curve.csv; run `muon study run {STUDY}` first.")
    return pd.concat(found)


def draw(axes: Axes, rows: pd.DataFrame, column: str, arms: tuple[str, ...]) -> None:
    """One line an arm of `column` against step; says the mean over the run as text."""
    for arm in arms:
        values = rows[rows.arm == arm].dropna(subset=[column]).groupby("step")[column]
        mean, low, high = values.mean(), values.min(), values.max()
        colour, style = STYLES[arm]
        marker = "o" if len(mean) < 8 else None
        axes.plot(mean.index, mean, style, color=colour, label=arm, linewidth=1.6, marker=marker, markersize=4)
        axes.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(mean):
            told = ", ".join(f"{step}: {mean[step]:.4g}" for step in mean.index[:: max(1, len(mean) // 6)])
            print(f"{column} {arm}: mean over steps {mean.mean():.4g}; {told}; last {mean.iloc[-1]:.4g}")


def main() -> None:
    """Read, draw, save."""
    rows = curves(Path(__file__).parents[2])
    muon = rows[rows.arm == "muon"].set_index(["seed", "step"]).val_loss
    keyed = rows.set_index(["seed", "step"])
    rows["behind"] = (keyed.val_loss - muon.reindex(keyed.index)).to_numpy()

    plt.rcParams |= {"svg.hashsalt": "muonlab", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    figure, grid = plt.subplots(3, 2, figsize=(9, 9.6), layout="constrained")
    panels = (
        ("opt_turn", PARTS, "1 − cosine to Muon's own update", "a  How far each part turns the update"),
        ("opt_momentum_rms", ("muon", *PARTS), "rms of the momentum", "b  Scale of the momentum"),
        (
            "opt_effective_rank_share_after",
            ("muon", "nolah", "nolah-gate", "nolah-project", "orthonoise"),
            "effective rank / k",
            "c  Rank of what is orthogonalised",
        ),
        (
            "hessian_top",
            ("muon", "nolah", "orthonoise"),
            "top eigenvalue of the Hessian",
            "d  Curvature (batch of the step, before it)",
        ),
        (
            "behind",
            ("nolah", "nolah-gate", "nolah-damp", "nolah-project", "nolah-annealed"),
            "validation loss − Muon's [nats/token]",
            "e  What the parts cost",
        ),
        ("behind", ("orthonoise", "isotropic"), "validation loss − Muon's [nats/token]", "f  Noise, and its control"),
    )
    for axes, (column, arms, label, title) in zip(grid.flat, panels, strict=True):
        draw(axes, rows, column, arms)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel="step", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        legend = {"frameon": False, "fontsize": 9}
        if column == "behind":
            axes.axhline(0, color="0.5", linewidth=0.8)
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend above the lines
            legend |= {"loc": "upper left", "ncols": 2}
        if column == "opt_momentum_rms":
            axes.set_yscale("log")
        if column == "opt_effective_rank_share_after":
            axes.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
            axes.set_ylim(0, 1)
            legend |= {"loc": "lower center", "ncols": 3}
        axes.legend(**legend)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
