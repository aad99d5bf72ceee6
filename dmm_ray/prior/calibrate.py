"""Computing a calibration from natural rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.prior.calibration import WINDOW_SCORES, Calibration, LayerCalibration, latent_norm
from dmm_ray.prior.quantiles import Table, bucket_edges
from dmm_ray.prior.windows import window_means

if TYPE_CHECKING:
    from dmm_ray.prior.model import ActivationPrior

WIDTHS = (8, 32)
"""Widths, in tokens, of the windows whose means are calibrated."""
MIN_WINDOWS, CHUNK = 16, 4096
"""Fewest windows for a table of window means, and rows normalised at once."""


def calibrate(
    prior: ActivationPrior,
    x: Tensor,
    ids: Tensor | np.ndarray,
    layer: int | None = None,
    weights: np.ndarray | None = None,
    steps: int = 32,
    probes: int = 1,
    seed: int = 0,
) -> Calibration:
    """Calibrate one layer of ``prior`` on natural rows that it was not trained on.

    Args:
        prior: the prior.
        x: (n, d) raw activations; window means are taken over runs of consecutive tokens.
        ids: (n, 2) integers, document and position.
        layer: the block number whose outputs they are; may be None for a single-layer prior.
        weights: (n,) positive: how many natural rows each row stands for; None weights all equally.
        steps: passed to ``log_prob``.
        probes: passed to ``log_prob``.
        seed: seed of its probes and of the velocity error's noise.

    Raises:
        UserError: as for ``log_prob``; ids that are not pairs; a score that is NaN or Inf.
    """
    index = prior.layer_index(layer)
    pairs = np.asarray(torch.as_tensor(ids).numpy(force=True))
    if pairs.shape != (len(x), 2):
        raise UserError(f"ids: expected {len(x)} pairs of document and position, got shape {pairs.shape}")
    number = prior.layers[index]
    found = prior.log_prob(x, layer=number, steps=steps, probes=probes, ids=pairs, seed=seed)
    scores = {
        "nats": found.nats,
        "latent": latent_norm(found.base, prior.d),
        "norm": squared_norm(prior, x, index),
        "velocity_error": prior.velocity_error(x, layer=number, ids=pairs, seed=seed),
    }
    for name, score in scores.items():
        if not score.isfinite().all():
            raise UserError(f"activations: the prior's {name} contains NaN or Inf; train it further")
    about = {
        "steps": steps, "probes": probes, "seed": seed, "rows": len(pairs), "documents": len(np.unique(pairs[:, 0])),
    }  # fmt: skip
    one = np.ones(len(pairs)) if weights is None else weights
    tables = _tables(scores, prior.d, pairs, one, about)
    return Calibration(prior.d, {number: tables}, prior.fingerprint())


def squared_norm(prior: ActivationPrior, x: Tensor, layer_index: int) -> Tensor:
    """``|z|^2`` (n,) float64 of raw rows (n, d) of the layer at index ``layer_index`` of ``prior``."""
    pieces = (prior.normalizer.normalize(piece.to(prior.device), layer_index) for piece in x.split(CHUNK))
    return torch.cat([z.double().square().sum(1) for z in pieces])


def _tables(
    scores: dict[str, Tensor],
    d: int,
    pairs: np.ndarray,
    weights: np.ndarray,
    about: dict[str, int],
) -> LayerCalibration:
    """Tables of the scores, then of the smallest share, then of window means, each computed from those before."""
    position = pairs[:, 1]
    edges = bucket_edges(position)

    def table(score: Tensor) -> Table:
        return Table.of(score.double().numpy(force=True), weights, position, edges)

    rows = {name: table(score) for name, score in scores.items()}
    at = torch.from_numpy(position)
    raw = LayerCalibration(rows, {}, about)
    _, _, least = raw.shares(scores["nats"], scores["latent"], scores["norm"], at)
    rows["combined"] = table(least)
    combined = 100 * rows["combined"].shares(least, at)[0]
    by_token = {
        "nats_per_dim": (scores["nats"].double() / d).numpy(force=True),
        "combined": combined.numpy(force=True),
    }
    found = {w: _window_tables(by_token, pairs, weights, w) for w in WIDTHS}
    return LayerCalibration(rows, {w: tables for w, tables in found.items() if tables}, about)


def _window_tables(
    by_token: dict[str, np.ndarray], pairs: np.ndarray, weights: np.ndarray, width: int
) -> dict[str, Table]:
    """Tables of the window means of one width; empty if there are too few windows."""
    means = {s: window_means(by_token[s], pairs[:, 0], pairs[:, 1], width) for s in WINDOW_SCORES}
    whole = np.isfinite(means["combined"])
    if whole.sum() < MIN_WINDOWS:
        return {}
    return {s: Table.of(values[whole], weights[whole]) for s, values in means.items()}
