"""Plots of the demo's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from train.evaluation.verification import FARS, Bools, Floats

POSITIVE, NEGATIVE = "#1b7837", "#762a83"
LINES = ("#7f7f7f", "#bf9000", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def roc(scores: Mapping[str, Floats], same: Bools, path: Path) -> None:
    """ROC of each method, the false accept rate on a log axis."""
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    floor = 1 / int((~same).sum())
    for (name, values), colour in zip(scores.items(), LINES, strict=False):
        far, tar, _ = roc_curve(same, values, drop_intermediate=False)
        auc = roc_auc_score(same, values)
        axes.step(
            np.maximum(far, floor), tar, where="post", color=colour, label=f"{name} (AUC {auc:.3f})"
        )
    for far in FARS:
        axes.axvline(far, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log",
        xlim=(floor, 1),
        ylim=(0, 1.01),
        xlabel="false accept rate",
        ylabel="true accept rate",
        title="People never seen in training",
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    _save(figure, path)


def histograms(
    scores: Mapping[str, Floats],
    same: Bools,
    thresholds: Mapping[str, tuple[float | None, float]],
    path: Path,
) -> None:
    """Scores of positive and negative pairs, each normalised to its own area.

    ``thresholds`` gives the learned one, if there is one, and the best one of each method.
    """
    columns = 2
    rows = -(-len(scores) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(10, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(scores) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, scores.items(), strict=False):
        bins = list(np.linspace(values.min(), values.max(), 61))
        axes.hist(
            values[~same], bins, density=True, color=NEGATIVE, alpha=0.55, label="different people"
        )
        axes.hist(values[same], bins, density=True, color=POSITIVE, alpha=0.55, label="same person")
        learned, best = thresholds[name]
        axes.axvline(best, color="0.3", linestyle=":", label=f"best for these pairs: {best:.2f}")
        if learned is not None:
            axes.axvline(learned, color="black", label=f"learned b/s: {learned:.2f}")
        axes.set(title=name, xlabel="cosine of a pair", ylabel="density")
        axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8, loc="upper left", ncols=2)
    _save(figure, path)


def loss_curves(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Total loss of each run, and the learned threshold of those that have one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, lines), colour in zip(runs.items(), LINES[2:], strict=False):
        epochs = [line["epoch"] for line in lines]
        left.plot(epochs, [line["loss"] for line in lines], color=colour, label=name)
        for term, style in (("class_loss", "--"), ("pair_loss", ":")):
            if lines[0]["class_loss"] is not None and lines[0]["pair_loss"] is not None:
                left.plot(
                    epochs,
                    [line[term] for line in lines],
                    style,
                    color=colour,
                    linewidth=0.9,
                    label=f"{name}: its {term.replace('_', ' ')}",
                )
        if lines[0]["threshold"] is not None:
            right.plot(epochs, [line["threshold"] for line in lines], color=colour, label=name)
    left.set(xlabel="epoch", ylabel="training loss", title="Loss", yscale="log")
    right.set(xlabel="epoch", ylabel="b / s (a cosine)", title="Learned unified threshold")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    _save(figure, path)
