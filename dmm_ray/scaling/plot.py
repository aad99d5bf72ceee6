"""The plot of a grid: loss against compute with the fitted law, and the delta LM loss against the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmm_ray.evaluation.plots import save
from dmm_ray.scaling.law import FittedLaw

PICTURE = "scaling"
BEYOND = 10.0
"""The curve is drawn this many times beyond the largest compute."""


def plot(out: str, results: Sequence[Mapping[str, Any]], best: Sequence[int], found: FittedLaw) -> None:
    """Write ``scaling.png`` into the folder ``out``."""
    with_lm = all(r["delta_lm_loss"] is not None for r in results)
    figure = Figure(figsize=(11 if with_lm else 6.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if with_lm else 1, squeeze=False)[0]
    _losses(axes[0], results, best, found)
    if with_lm:
        _delta_lm(axes[1], results)
    save(out, PICTURE, figure)


def _losses(axes: Axes, results: Sequence[Mapping[str, Any]], best: Sequence[int], found: FittedLaw) -> None:
    compute = np.array([r["flops"] for r in results])
    drawn = np.geomspace(compute.min(), BEYOND * compute.max(), 100)
    band = np.quantile([law.at(drawn) for law in found.resampled], (0.025, 0.975), axis=0)
    axes.fill_between(drawn, band[0], band[1], color="#d1495b", alpha=0.15, linewidth=0)
    axes.plot(
        drawn,
        found.law.at(drawn),
        color="#d1495b",
        label=f"E = {found.law.irreducible:.3f}, a = {found.law.exponent:.3f}",
    )
    for size in dict.fromkeys((r["d_model"], r["n_blocks"]) for r in results):
        ours = [r for r in results if (r["d_model"], r["n_blocks"]) == size]
        axes.plot(
            [r["flops"] for r in ours], [r["loss"] for r in ours], "o-", markersize=4, linewidth=0.8,
            label=f"width {size[0]}, {size[1]} blocks",
        )  # fmt: skip
    at = [results[i] for i in best]
    axes.plot(
        [r["flops"] for r in at],
        [r["loss"] for r in at],
        "o",
        markersize=9,
        fillstyle="none",
        color="#444444",
    )
    axes.set_xscale("log")
    axes.set_xlabel("training compute, FLOPs")
    axes.set_ylabel("flow-matching loss on test documents")
    axes.legend(fontsize=8, frameon=False)


def _delta_lm(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    axes.scatter([r["loss"] for r in results], [r["delta_lm_loss"] for r in results], color="#30638e", s=18)
    axes.set_xlabel("flow-matching loss on test documents")
    axes.set_ylabel("delta LM loss at u = 0.5, nats/token")
