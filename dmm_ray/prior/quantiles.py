"""Quantile tables: where a score lies among the scores of natural rows, by position in the document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUANTILE_LEVELS = 257
"""Quantiles kept per score, at the levels (k + 1/2) / 257."""
TAIL = 12
"""The tails' slope is taken between the outermost quantile and the one this many further in (about 5 % of rows)."""
ROUNDING = 1e-5
"""Relative rounding error of a score: how much float32 sums may differ with the batch or the machine."""
MIN_ROWS = 128
"""Positions are pooled until a bucket has this many rows."""


@dataclass(frozen=True)
class Table:
    """Quantiles of one score over all rows and by bucket of positions.

    A score's *share below* is the fraction of natural rows that score less, ties counted half, interpolated linearly
    between the quantiles. Beyond the outermost quantile, shares fall off exponentially at the slope of the last 5 %:
    they preserve the order of the scores and reach 0 or 1 only at the limits of floating point.
    """

    edges: Tensor
    """(buckets,) int64: each bucket's first position, ascending; earlier positions belong to the first bucket."""
    values: Tensor
    """(1 + buckets, 257) float64, ascending along the second dimension; the first row covers all positions."""

    def shares(self, score: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The shares of natural rows below and above each score (n,), float64; NaN where the score is NaN.

        Args:
            score: (n,).
            position: (n,) tokens from the document's start; None compares with all positions.
        """
        score = score.double()
        if position is None or not len(self.edges):
            return _shares(self.values[0].to(score.device), score)
        at = position.to(score.device).long().contiguous()
        bucket = torch.searchsorted(self.edges.to(score.device), at, right=True)
        below, above = torch.empty_like(score), torch.empty_like(score)
        for found in bucket.clamp_(min=1).unique().tolist():
            inside = bucket == found
            below[inside], above[inside] = _shares(self.values[found].to(score.device), score[inside])
        return below, above

    @classmethod
    def of(
        cls,
        score: np.ndarray,
        weights: np.ndarray,
        position: np.ndarray | None = None,
        edges: Tensor | None = None,
    ) -> Table:
        """Build the table from the scores of natural rows.

        Args:
            score: (n,).
            weights: (n,) positive: how many rows each row stands for.
            position: (n,), with ``edges``; None makes no buckets.
            edges: as returned by :func:`bucket_edges`.
        """
        edges = torch.empty(0, dtype=torch.int64) if edges is None else edges
        parts = [np.ones(len(score), dtype=bool)]
        if position is not None:
            bucket = np.searchsorted(edges.numpy(), position, side="right").clip(min=1)
            parts += [bucket == b for b in range(1, len(edges) + 1)]
        return cls(edges, torch.from_numpy(np.stack([quantiles(score[p], weights[p]) for p in parts])))


def quantiles(score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The 257 weighted quantiles of scores (n,), float64: a row's level is the weight below it plus half its own.

    With equal weights that is Hazen's plotting position (i + 1/2) / n.
    """
    order = np.argsort(score, kind="stable")
    mass = weights[order].astype(np.float64)
    level = (np.cumsum(mass) - mass / 2) / mass.sum()
    return np.interp(
        (np.arange(QUANTILE_LEVELS) + 0.5) / QUANTILE_LEVELS, level, score[order].astype(np.float64)
    )


def bucket_edges(position: np.ndarray, min_rows: int = MIN_ROWS) -> Tensor:
    """First positions of the buckets 0, 1, 2-3, 4-7, ..., neighbours pooled until each has ``min_rows`` rows."""
    starts = np.array([0] + [1 << i for i in range(int(position.max()).bit_length())])
    counts = np.bincount(np.searchsorted(starts, position, side="right") - 1, minlength=len(starts))
    edges, rows = [0], 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if rows >= min_rows:
            edges.append(start)
            rows = 0
        rows += count
    if rows < min_rows and len(edges) > 1:
        edges.pop()
    return torch.tensor(edges)


def _shares(values_Q: Tensor, score_N: Tensor) -> tuple[Tensor, Tensor]:
    """Shares below and above, looked up in one row of a table."""
    last = QUANTILE_LEVELS - 1
    # If natural rows are all alike, a score that differs only by rounding is one of them and not beyond them all.
    for edge in (values_Q[0], values_Q[last]):
        score_N = torch.where((score_N - edge).abs() <= ROUNDING * edge.abs(), edge, score_N)
    first = torch.searchsorted(values_Q, score_N)
    after = torch.searchsorted(values_Q, score_N, right=True)
    left, right = values_Q[(first - 1).clamp(0, last)], values_Q[first.clamp(max=last)]
    between = torch.where(right > left, (score_N - left) / (right - left), 0.5)
    rank = torch.where(after > first, (first + after) / 2, first - 0.5 + between)
    below = rank / QUANTILE_LEVELS
    above = 1 - below
    low, high = (
        _tail(values_Q[0] - score_N, values_Q[TAIL] - values_Q[0]),
        _tail(score_N - values_Q[last], values_Q[last] - values_Q[last - TAIL]),
    )
    under, over = score_N < values_Q[0], score_N > values_Q[last]
    below = torch.where(under, low, torch.where(over, 1 - high, below))
    above = torch.where(under, 1 - low, torch.where(over, high, above))
    unknown = score_N.isnan()
    return below.masked_fill(unknown, torch.nan), above.masked_fill(unknown, torch.nan)


def _tail(distance: Tensor, width: Tensor) -> Tensor:
    """``p exp(-distance / s)`` beyond the outermost level p, with s such that the last ``width`` has the same slope."""
    outermost, scale = 0.5 / QUANTILE_LEVELS, width / np.log(2 * TAIL + 1)
    return outermost * torch.exp(-distance.clamp(min=0) / scale.clamp(min=torch.finfo(torch.float64).tiny))
