"""The report's plots, rendered off screen and saved as PNG files next to it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dmm_ray.evaluation.statistics import DECILES
from dmm_ray.files import join, write_bytes
from dmm_ray.gaussians import mean_and_covariance

COLORS = {
    "prior": "#d1495b",
    "gaussian": "#30638e",
    "pca": "#5fa8d3",
    "mixture": "#3c8d53",
    "factor_analysers": "#c58b1b",
    "sae": "#9a6dd7",
    "sae_pretrained": "#5f3aa0",
    "untrained": "#8d8d8d",
    "real": "#444444",
}
NAMES = {
    "prior": "prior",
    "gaussian": "Gaussian",
    "pca": "PCA (95 %)",
    "mixture": "mixture",
    "factor_analysers": "factor analysers",
    "sae": "SAE",
    "sae_pretrained": "pretrained SAE",
    "untrained": "untrained prior",
}
PICTURES = {
    "loss_by_level": "Flow-matching loss by noise level (lower is better; u = 0 is data, u = 1 noise)",
    "delta_lm": "Delta LM loss of restoring rows noised to u = 0.5 (lower is better)",
    "samples": "Real test rows and samples, projected on the first two principal directions of the real rows",
    "training": "Training of the prior",
}
SCATTER_ROWS = 1500


def save_all(
    out: str,
    summary: Mapping[str, Any],
    test_nd: Tensor,
    drawn: Mapping[str, Tensor],
    curve: Sequence[Mapping[str, Any]],
) -> None:
    """Write every plot that there is data for into the folder ``out``."""
    save(out, "loss_by_level", loss_by_level(summary["by_level"]))
    if any(v is not None for v in summary["fidelity"]["delta_lm_loss"].values()):
        save(out, "delta_lm", delta_lm(summary["fidelity"]["delta_lm_loss"]))
    if drawn:
        save(out, "samples", scatter(test_nd, drawn))
    if curve:
        save(out, "training", training(curve))


def save(out: str, name: str, figure: Figure) -> None:
    """Write ``figure`` as ``out/name.png``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(join(out, f"{name}.png"), buffer.getvalue())


def loss_by_level(table: Mapping[str, Sequence[float | None]]) -> Figure:
    """One line per method; lines are cut off beyond the range of the prior and the Gaussian."""
    figure, axes = _figure()
    u = (np.arange(DECILES) + 0.5) / DECILES
    lines = {k: np.array([np.nan if v is None else v for v in table[k]]) for k in NAMES if k in table}
    for name, line in lines.items():
        axes.plot(
            u,
            line,
            "o-",
            color=COLORS[name],
            label=NAMES[name],
            linewidth=2.4 if name == "prior" else 1.5,
            ms=4,
        )
    shown = np.concatenate([lines[k] for k in ("prior", "gaussian") if k in lines])
    top = float(np.nanmax(shown)) * 1.35
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="noise level u", ylabel="mean squared velocity error")
    axes.legend(frameon=False, ncols=2, fontsize=9)
    return figure


def delta_lm(table: Mapping[str, float | None]) -> Figure:
    """One bar per method, in nats per token."""
    figure, axes = _figure()
    bars = {k: v for k in NAMES if (v := table.get(k)) is not None}
    found = axes.bar([NAMES[k] for k in bars], list(bars.values()), color=[COLORS[k] for k in bars])
    axes.bar_label(found, fmt="%.3f", fontsize=9, padding=2)
    axes.set(ylabel="added LM loss (nats/token)")
    axes.tick_params(axis="x", labelsize=9)
    axes.margins(y=0.12)
    return figure


def scatter(test_nd: Tensor, drawn: Mapping[str, Tensor]) -> Figure:
    """Real rows and each method's samples, projected on the first two principal directions of the test rows."""
    mean, covariance = mean_and_covariance(test_nd)
    plane = torch.linalg.eigh(covariance).eigenvectors[:, -2:].flip(1)

    def project(rows: Tensor) -> np.ndarray:
        return ((rows.double() - mean) @ plane).numpy(force=True)

    rng = np.random.default_rng(0)
    at = torch.from_numpy(rng.permutation(len(test_nd))[:SCATTER_ROWS])
    real = project(test_nd[at.to(test_nd.device)])
    panels = {"real": real} | {
        k: project(drawn[k][:SCATTER_ROWS])
        for k in ("prior", "mixture", "factor_analysers", "gaussian", "untrained")
        if k in drawn
    }
    figure = Figure(figsize=(2.1 * len(panels), 2.4), layout="constrained", facecolor="white")
    low, high = np.percentile(real, [0.5, 99.5], axis=0)
    margin = 0.25 * (high - low) + 1e-6
    for i, (name, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, color=COLORS[name], linewidths=0)
        axes.set(
            xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1])
        )
        axes.set_title("real" if name == "real" else NAMES[name], fontsize=9)
        axes.set(xticks=[], yticks=[])
    return figure


def training(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss against samples seen."""
    figure, axes = _figure()
    for key, label, style in (
        ("loss", "training", "-"),
        ("validation_loss", "validation (averaged weights)", "o--"),
    ):
        points = [(r["samples"] / 1e6, r[key]) for r in curve if r.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=label,
                ms=4,
                color=COLORS["prior" if key == "loss" else "real"],
            )
    axes.set(xlabel="samples seen (millions)", ylabel="flow-matching loss")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
