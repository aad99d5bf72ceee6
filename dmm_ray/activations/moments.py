"""Count, mean and sum of squared deviations per coordinate, in float64, mergeable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18
"""Values per step: few enough for the cache."""


@dataclass(frozen=True)
class Moments:
    """First two moments of some rows of width d."""

    count: int
    mean: np.ndarray
    """(d,) float64."""
    m2: np.ndarray
    """(d,) float64: sum over rows of (x - mean)^2."""

    @classmethod
    def empty(cls, d: int) -> Moments:
        """The moments of no rows."""
        return cls(0, np.zeros(d), np.zeros(d))

    @classmethod
    def of(cls, rows: Tensor) -> tuple[Moments, int]:
        """The moments of the rows (n, d) that are finite, and how many are not."""
        total, bad = cls.empty(rows.shape[1]), 0
        for chunk in rows.split(max(1, CHUNK_VALUES // rows.shape[1])):
            part = cls._of_finite(chunk.double())
            if not np.isfinite(part.m2).all():
                finite = torch.isfinite(chunk).all(1)
                bad += int((~finite).sum())
                part = cls._of_finite(chunk[finite].double())
            total = total.merge(part)
        return total, bad

    @classmethod
    def _of_finite(cls, rows: Tensor) -> Moments:
        if not len(rows):
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        return cls(len(rows), mean.numpy(), (rows - mean).square_().sum(0).numpy())

    @property
    def var(self) -> np.ndarray:
        """(d,) population variance."""
        return self.m2 / max(self.count, 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """As named arrays: ``prefix.count`` (1,) int64, ``prefix.mean`` and ``prefix.m2`` (d,) float64."""
        return {
            f"{prefix}.count": np.array([self.count], dtype=np.int64),
            f"{prefix}.mean": self.mean,
            f"{prefix}.m2": self.m2,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Moments:
        """What ``arrays`` gave. Raises KeyError where the names are not there."""
        return cls(int(arrays[f"{prefix}.count"][0]), arrays[f"{prefix}.mean"], arrays[f"{prefix}.m2"])
