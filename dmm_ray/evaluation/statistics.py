"""Means with standard errors that treat documents, not rows, as the independent units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DECILES = 10
NORMAL_95 = 1.959964
"""Half the width of a 95 % interval, in standard errors."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean, with what each document contributes to its error."""

    mean: float
    docs: np.ndarray
    """(g,) numbers of the documents, ascending."""
    influence: np.ndarray
    """(g,) by how much each document moves the mean away from the true one; they add up to 0."""

    @property
    def stderr(self) -> float | None:
        """Standard error, clustered by document; None with fewer than two documents."""
        return _stderr(self.influence)


class Ratio(NamedTuple):
    """One mean relative to another: -0.4 is 40 % lower."""

    value: float
    interval: tuple[float, float] | None
    """95 % confidence interval, clustered by document; None with fewer than two documents."""


def clustered(values: np.ndarray, docs: np.ndarray) -> Estimate | None:
    """The mean of ``values`` (n,) over rows with documents ``docs`` (n,); None if there are no rows."""
    if not len(values):
        return None
    mean = float(values.mean())
    return _estimate(mean, (values - mean) / len(values), docs)


def over_levels(values: np.ndarray, decile: np.ndarray, docs: np.ndarray) -> Estimate | None:
    """The mean over noise levels with equal weights: rows are averaged within each decile of u, then the deciles.

    None if a decile has no rows.
    """
    counts = np.bincount(decile, minlength=DECILES)
    if (counts == 0).any():
        return None
    means = np.bincount(decile, values, minlength=DECILES) / counts
    return _estimate(float(means.mean()), (values - means[decile]) / (DECILES * counts[decile]), docs)


def relative(a: Estimate | None, b: Estimate | None) -> Ratio | None:
    """``a / b - 1`` of two means over the same documents; None if either is missing or ``b`` is not positive.

    The interval is ``a / b - 1`` plus or minus 1.96 standard errors of ``(a - (a / b) b) / b`` (delta method). It takes
    the pairing into account: noise and documents that are hard for both methods cancel.

    Raises:
        ValueError: the documents differ.
    """
    if a is None or b is None or b.mean <= 0:
        return None
    if not np.array_equal(a.docs, b.docs):
        raise ValueError("relative: expected two means over the same documents")
    ratio = a.mean / b.mean
    stderr = _stderr((a.influence - ratio * b.influence) / b.mean)
    value = ratio - 1
    return Ratio(value, None if stderr is None else (value - NORMAL_95 * stderr, value + NORMAL_95 * stderr))


def by_decile(values: np.ndarray, decile: np.ndarray) -> list[float | None]:
    """The mean of ``values`` in each decile of u, in ascending order; None for a decile without rows."""
    counts = np.bincount(decile, minlength=DECILES)
    sums = np.bincount(decile, values, minlength=DECILES)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def _estimate(mean: float, parts: np.ndarray, docs: np.ndarray) -> Estimate:
    """``parts`` (n,) are the rows' deviations from the mean, divided by their number."""
    distinct, which = np.unique(docs, return_inverse=True)
    return Estimate(mean, distinct, np.bincount(which, parts))


def _stderr(influence: np.ndarray) -> float | None:
    """``sqrt(G / (G - 1) sum_g influence_g^2)`` for G documents."""
    documents = len(influence)
    if documents < 2:
        return None
    return float(np.sqrt(documents / (documents - 1) * np.square(influence).sum()))
