"""Mergeable moments in float64: count, mean, squared deviations per coordinate, all pairs of coordinates on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18
"""Values per step: small enough for the cache."""
PRODUCT_ROWS = 4096
MASSIVE_RMS = 20.0


@dataclass(frozen=True)
class Moments:
    """First two moments of a set of rows of width d."""

    count: int
    mean: np.ndarray
    """(d,) float64."""
    m2: np.ndarray
    """(d,) float64: sum over rows of (x - mean)^2."""
    co: np.ndarray | None = None
    """(d, d) float64: sum over rows of (x - mean)(x - mean)^T, if requested."""

    @classmethod
    def empty(cls, d: int, covariance: bool = False) -> Moments:
        """The moments of zero rows."""
        return cls(0, np.zeros(d), np.zeros(d), np.zeros((d, d)) if covariance else None)

    @classmethod
    def of(cls, rows: Tensor, covariance: bool = False) -> tuple[Moments, int]:
        """The moments of the finite rows among (n, d), on any device, and the number of rows with NaN or Inf.

        Covariance products are computed in float32 from centred values and summed in float64 over chunks of rows.
        """
        total, bad = cls.empty(rows.shape[1]), 0
        for chunk in rows.split(max(1, CHUNK_VALUES // rows.shape[1])):
            part = cls._of_finite(chunk.double())
            if not np.isfinite(part.m2).all():
                finite = torch.isfinite(chunk).all(1)
                bad += int((~finite).sum())
                part = cls._of_finite(chunk[finite].double())
            total = total.merge(part)
        return (total._with_products(rows) if covariance else total), bad

    @classmethod
    def _of_finite(cls, rows: Tensor) -> Moments:
        if not len(rows):
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        return cls(len(rows), mean.cpu().numpy(), (rows - mean).square_().sum(0).cpu().numpy())

    def _with_products(self, rows: Tensor) -> Moments:
        mean = torch.from_numpy(self.mean).to(rows.device)
        total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=rows.device)
        for chunk in rows.split(PRODUCT_ROWS):
            centred = (chunk.double() - mean).float()
            centred = centred[torch.isfinite(centred).all(1)]
            total += centred.T @ centred
        return replace(self, co=total.cpu().numpy())

    @property
    def var(self) -> np.ndarray:
        """(d,) population variance."""
        return self.m2 / max(self.count, 1)

    @property
    def covariance(self) -> np.ndarray | None:
        """(d, d) population covariance, if requested."""
        return None if self.co is None else self.co / max(self.count, 1)

    def massive(self) -> dict[int, float]:
        """Dimensions whose root mean square is over 20 times that of the median dimension, with the ratio, largest
        first, at most 8: the massive activations of Sun et al. 2024 (arXiv 2402.17762)."""
        rms = np.sqrt(self.var + self.mean**2)
        ratio = rms / max(float(np.median(rms)), 1e-30)
        return {int(i): round(float(ratio[i]), 1) for i in np.argsort(-ratio)[:8] if ratio[i] > MASSIVE_RMS}

    def merge(self, other: Moments) -> Moments:
        """The moments of the union of both sets of rows (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        weight = self.count * other.count / count
        co = None
        if self.co is not None and other.co is not None:
            co = self.co + other.co + np.outer(delta, delta) * weight
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * weight, co)

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """As named arrays: ``prefix.count`` (1,) int64, ``prefix.mean`` and ``prefix.m2`` (d,) float64;
        ``prefix.co`` (d, d) float64 if present."""
        products = {} if self.co is None else {f"{prefix}.co": self.co}
        return {
            f"{prefix}.count": np.array([self.count], dtype=np.int64),
            f"{prefix}.mean": self.mean,
            f"{prefix}.m2": self.m2,
            **products,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Moments:
        """The inverse of ``arrays``. Raises KeyError if a name is missing."""
        return cls(
            int(arrays[f"{prefix}.count"][0]),
            arrays[f"{prefix}.mean"],
            arrays[f"{prefix}.m2"],
            arrays.get(f"{prefix}.co"),
        )
