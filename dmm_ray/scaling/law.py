"""The scaling law ``L(C) = E + A C^-a`` of the lowest loss that training compute C buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng

EXPONENT_BOUNDS = (0.01, 2.0)
"""Exponents looked at; the published law has 0.169."""
LEAST_POINTS = 4


class Law(NamedTuple):
    """``L(C) = E + A (C / scale)^-a``."""

    irreducible: float
    """E, the loss that no compute gets below."""
    amplitude: float
    """A, the reducible loss at C = scale."""
    exponent: float
    """a."""
    scale: float
    """The geometric mean of the fitted compute, FLOPs: with it A is a loss, and hardly depends on a."""

    def at(self, compute: np.ndarray) -> np.ndarray:
        """The loss at some compute, FLOPs."""
        return self.irreducible + self.amplitude * (np.asarray(compute) / self.scale) ** -self.exponent


class FittedLaw(NamedTuple):
    """A law with 95 % intervals of its parameters."""

    law: Law
    intervals: dict[str, tuple[float, float]]
    """By parameter, from resampled residuals; wide where the points do not determine it."""
    resampled: list[Law]
    """The law of each resample, from which the band around the curve comes."""


def frontier(compute: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices (m,) of the points that no cheaper or equally cheap one beats, by rising compute (n,)."""
    order = np.lexsort((loss, compute))
    best = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], loss[order][1:] < best[:-1]])]


def fit_law(
    compute: Sequence[float], loss: Sequence[float], resamples: int = 1000, seed: int = 0
) -> FittedLaw:
    """Least squares over E >= 0, A >= 0 and a, on points (m,) of the frontier.

    For a given a the law is linear in E and A, which leaves a search in one dimension (variable projection). The
    intervals resample the residuals, scaled for the three fitted parameters.

    Raises:
        UserError: fewer than four points.

    Example:
        >>> found = fit_law([1e9, 1e10, 1e11, 1e12], [1.5, 1.25, 1.125, 1.0625])
        >>> round(found.law.irreducible, 3), round(found.law.exponent, 3)
        (1.0, 0.301)
    """
    points, values = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    if len(points) < LEAST_POINTS:
        raise UserError(
            f"sizes, samples: only {len(points)} runs are on the frontier of loss and compute, and a law of three "
            f"parameters needs at least {LEAST_POINTS}: give more --sizes or --samples"
        )
    law = _least_squares(points, values)
    fitted = law.at(points)
    residuals = (values - fitted) * np.sqrt(len(points) / (len(points) - 3))
    rng = numpy_rng(seed)
    resampled = [
        _least_squares(points, fitted + rng.choice(residuals, len(points))) for _ in range(resamples)
    ]
    intervals = {
        name: tuple(np.quantile([getattr(one, name) for one in resampled], (0.025, 0.975)).tolist())
        for name in ("irreducible", "amplitude", "exponent")
    }
    return FittedLaw(law, intervals, resampled)


def _least_squares(compute: np.ndarray, loss: np.ndarray) -> Law:
    scale = float(np.exp(np.log(compute).mean()))

    def solve(log_exponent: float) -> tuple[np.ndarray, float]:
        terms = np.stack([np.ones_like(compute), (compute / scale) ** -np.exp(log_exponent)], axis=1)
        found, residual = nnls(terms, loss)
        return found, float(residual)

    low, high = np.log(EXPONENT_BOUNDS)
    # The residual can have more than one valley: the best point of a grid brackets the lowest.
    grid = np.linspace(low, high, 40)
    best = int(np.argmin([solve(x)[1] for x in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(lambda x: solve(x)[1], bounds=bounds, method="bounded")
    (irreducible, amplitude), _ = solve(found.x)
    return Law(float(irreducible), float(amplitude), float(np.exp(found.x)), scale)
