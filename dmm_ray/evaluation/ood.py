"""How well each score of a prior separates unnatural from natural rows, and whether its percentiles are uniform."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.calibrate import squared_norm
from dmm_ray.seeds import numpy_rng

SCORES = ("log_p", "typicality", "latent", "norm", "proxy", "combined", "pair", "product")
RESAMPLES = 200
GRID = np.linspace(0.01, 0.99, 99)


class Auc(NamedTuple):
    """The probability that a score ranks an unnatural row below a natural one, ties counted half; 0.5 is chance."""

    auc: float
    stderr: float
    """Standard error, by resampling documents."""


class Uniformity(NamedTuple):
    """How far percentiles of natural rows are from uniform."""

    distance: float
    """Largest difference between their distribution and the uniform one (Kolmogorov-Smirnov distance)."""
    p_value: float
    """Share of centred resamples of documents with a distance at least as large; a small value means not uniform.

    The uncertainty from the calibration's own rows is not included.
    """


def row_scores(
    prior: ActivationPrior,
    x: Tensor,
    ids: Tensor,
    layer: int | None = None,
    steps: int = 32,
    probes: int = 2,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every score of ``SCORES``, (n,) float64 in [0, 1], calibrated by position; lower is less natural.

    ``log_p``: percentile of log p. ``typicality``: the same, two-sided. ``latent``: two-sided percentile of the latent
    norm. ``norm``: two-sided percentile of the normalised row's norm. ``proxy``: percentile of the velocity error.
    ``combined``: as returned by ``log_prob``. Two combinations are for comparison only and not recalibrated: ``pair``,
    the lesser of ``log_p`` and ``latent``, and ``product``, their product.

    Args:
        prior: a calibrated prior.
        x: (n, d) raw activations.
        ids: (n, 2) document and position.
        layer: the block whose output they are.
        steps: steps of ``log_prob``.
        probes: probes of ``log_prob``.
        seed: seed of ``log_prob`` and the velocity error.

    Raises:
        UserError: as for ``log_prob``; or the prior is not calibrated for the layer.
    """
    row = prior.layer_index(layer)
    number, position = prior.layers[row], ids[:, 1]
    if prior.calibration is None:
        raise UserError(
            "prior: not calibrated; `dmm train` calibrates a prior, others require a store of natural rows"
        )
    found = prior.log_prob(x, layer=number, steps=steps, probes=probes, ids=ids, seed=seed)
    error = prior.velocity_error(x, layer=number, ids=ids, seed=seed)
    norm = squared_norm(prior, x, row)
    log_p, latent, combined, proxy, own = (
        p.double().numpy(force=True) / 100
        for p in (
            *prior.calibration.percentiles(number, found.nats, found.base, norm, position),
            prior.calibration.proxy_percentile(number, error, position),
            100 * prior.calibration.by_layer[number].two_sided("norm", norm, position),
        )
    )
    typicality = 2 * np.minimum(log_p, 1 - log_p)
    every = (log_p, typicality, latent, own, proxy, combined, np.minimum(log_p, latent), log_p * latent)
    return dict(zip(SCORES, every, strict=True))


def auc(
    natural: np.ndarray, natural_docs: np.ndarray, other: np.ndarray, other_docs: np.ndarray, seed: int = 0
) -> Auc:
    """The AUC of a score for natural rows (n,) against other rows (m,), with documents as the units of resampling."""
    rng = numpy_rng(seed)
    below = _wins(natural, other)
    by_document = [_grouped(docs) for docs in (natural_docs, other_docs)]
    found = []
    for _ in range(RESAMPLES):
        a, b = (
            np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]) for rows in by_document
        )
        found.append(_wins(natural[a], other[b]))
    return Auc(below, float(np.std(found)))


def uniformity(percentile: np.ndarray, docs: np.ndarray, seed: int = 0) -> Uniformity:
    """Test whether percentiles (n,) of natural rows, in [0, 1], are uniform, by resampling their documents (n,)."""
    rng = numpy_rng(seed)
    _, which = np.unique(docs, return_inverse=True)
    counts = np.bincount(which)
    below = np.stack([np.bincount(which, percentile <= level, len(counts)) for level in GRID], axis=1)
    gap = below.sum(0) / counts.sum() - GRID
    as_large = 0
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(counts), len(counts))
        again = below[at].sum(0) / counts[at].sum() - GRID
        as_large += bool(np.abs(again - gap).max() >= np.abs(gap).max())
    return Uniformity(float(np.abs(gap).max()), (as_large + 1) / (RESAMPLES + 1))


def _wins(natural: np.ndarray, other: np.ndarray) -> float:
    ranked = np.sort(natural)
    higher = len(ranked) - (np.searchsorted(ranked, other) + np.searchsorted(ranked, other, side="right")) / 2
    return float(higher.mean() / len(ranked))


def _grouped(docs: np.ndarray) -> list[np.ndarray]:
    """The rows of each document."""
    order = np.argsort(docs, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(docs[order])) + 1)
