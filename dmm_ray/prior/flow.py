"""The probability path between activations and noise, and the noise levels drawn in training.

Convention, everywhere: ``z_u = (1 - u) z + u * noise`` with u = 0 data and u = 1 noise; the velocity is
``d z_u / d u = noise - z`` (linear flow matching: Lipman et al. 2023, Liu et al. 2023).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOISE_LEVELS = 1000
"""Training noise levels are k / NOISE_LEVELS for k = 1..NOISE_LEVELS; between them the network is smooth."""


def interpolate(z: Tensor, noise: Tensor, u: Tensor | float) -> Tensor:
    """``z_u`` for rows z (n, d), noise (n, d) and u, a number or one per row (n,)."""
    if isinstance(u, Tensor) and u.ndim == 1:
        u = u[:, None]
    return (1 - u) * z + u * noise


def posterior_mean(z_u: Tensor, velocity: Tensor, u: Tensor | float) -> Tensor:
    """``E[z | z_u] = z_u - u * E[noise - z | z_u]`` for rows (n, d)."""
    if isinstance(u, Tensor) and u.ndim == 1:
        u = u[:, None]
    return z_u - u * velocity


def batch_levels(seed: int, batch: int, distinct: int) -> Tensor:
    """The noise levels of one global batch: stratified over 1..NOISE_LEVELS, uniform for every sample.

    One level is drawn in each of ``distinct`` equal strata and shared by an equally long run of samples (rows in random
    order), so that the network's time path, a quarter of its cost, runs once per distinct level.

    Args:
        seed: the run's seed.
        batch: index of the global batch.
        distinct: number of strata, at most NOISE_LEVELS.

    Returns:
        u (distinct,) float32 in (0, 1], ascending.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, batch], dtype=np.uint64)))
    strata = (np.arange(distinct) + rng.random(distinct)) * (NOISE_LEVELS / distinct)
    return torch.from_numpy(((np.floor(strata) + 1) / NOISE_LEVELS).astype(np.float32))
