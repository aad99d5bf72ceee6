"""Means with standard errors that treat documents, not rows, as the independent units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DECILES = 10


class Estimate(NamedTuple):
    """A mean and its standard error, clustered by document (None with fewer than two documents)."""

    mean: float
    stderr: float | None


def clustered(values: np.ndarray, docs: np.ndarray) -> Estimate | None:
    """The mean of ``values`` (n,) over rows with documents ``docs`` (n,); None if there are no rows."""
    if not len(values):
        return None
    mean = float(values.mean())
    return Estimate(mean, _stderr((values - mean) / len(values), docs))


def over_levels(values: np.ndarray, decile: np.ndarray, docs: np.ndarray) -> Estimate | None:
    """The mean over noise levels with equal weights: rows are averaged within each decile of u, then the deciles.

    None if a decile has no rows.
    """
    counts = np.bincount(decile, minlength=DECILES)
    if (counts == 0).any():
        return None
    means = np.bincount(decile, values, minlength=DECILES) / counts
    return Estimate(float(means.mean()), _stderr((values - means[decile]) / (DECILES * counts[decile]), docs))


def by_decile(values: np.ndarray, decile: np.ndarray) -> list[float | None]:
    """The mean of ``values`` in each decile of u, in ascending order; None for a decile without rows."""
    counts = np.bincount(decile, minlength=DECILES)
    sums = np.bincount(decile, values, minlength=DECILES)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def _stderr(parts: np.ndarray, docs: np.ndarray) -> float | None:
    """``sqrt(G / (G - 1) sum_g (sum of the parts of document g)^2)`` for G documents."""
    _, which = np.unique(docs, return_inverse=True)
    sums = np.bincount(which, parts)
    return float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum())) if len(sums) > 1 else None
