"""The full-covariance Gaussian: the optimal linear denoiser, in closed form at every noise level."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from dmm_ray.baselines.base import FLOOR
from dmm_ray.gaussians import mean_and_covariance
from dmm_ray.gaussians.levels import gain, levels_of, shrink
from dmm_ray.seeds import torch_rng


class Gaussian:
    """``N(mean, covariance)``, held as its eigendecomposition so that each noise level costs two (d, d) products."""

    def __init__(self, mean_d: Tensor, values_d: Tensor, vectors_dd: Tensor, seconds: float = 0.0) -> None:
        """``values_d`` and the columns of ``vectors_dd`` are the covariance's eigenvalues and eigenvectors, float64."""
        self.mean = mean_d
        self.values = values_d
        self.vectors = vectors_dd
        self.seconds = seconds
        d = len(mean_d)
        self.n_parameters = d + d * (d + 1) // 2
        self.flops_per_row = 4 * d * d

    @classmethod
    def fit(cls, z_nd: Tensor) -> Self:
        """Fit mean and covariance to the training rows (n, d); eigenvalues are floored at ``FLOOR``.

        Example:
            >>> Gaussian.fit(torch.randn(500, 3)).velocity(torch.zeros(2, 3), 0.5).shape
            torch.Size([2, 3])
        """
        start = time.perf_counter()
        mean_d, covariance_dd = mean_and_covariance(z_nd)
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        return cls(mean_d, values_d.clamp_min(FLOOR), vectors_dd, time.perf_counter() - start)

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``-m + V C(u) V^T (z_u - (1 - u) m)``, with ``C`` of :func:`gain` on the eigenvalues."""
        return self._affine(z_nd, u_n, gain, -self.mean)

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``m + V S(u) V^T (z_u - (1 - u) m)``, with ``S`` of :func:`shrink` on the eigenvalues."""
        return self._affine(z_nd, u_n, shrink, self.mean)

    def _affine(self, z_nd: Tensor, u_n: Tensor | float, factor: Callable, offset_d: Tensor) -> Tensor:
        u_n1 = levels_of(u_n, len(z_nd), z_nd.device).double()[:, None]
        rotated_nd = (z_nd.double() - (1 - u_n1) * self.mean) @ self.vectors
        return ((rotated_nd * factor(self.values, u_n1)) @ self.vectors.T + offset_d).to(z_nd.dtype)

    def loss(self, u: float) -> float:
        """Flow-matching loss per dimension of this Gaussian on its own samples at level ``u``.

        ``mean over eigenvalues of v / ((1 - u)^2 v + u^2)``: the variance of ``noise - z`` given ``z_u``.
        """
        return float((self.values / ((1 - u) ** 2 * self.values + u * u)).mean())

    def log_prob(self, z_nd: Tensor) -> Tensor:
        """Log density (n,) in nats, float64."""
        rotated = (z_nd.double() - self.mean) @ self.vectors
        constant = len(self.mean) * math.log(2 * math.pi) + self.values.log().sum()
        return -0.5 * ((rotated.square() / self.values).sum(1) + constant)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw ``n`` rows (n, d), float32."""
        generator = torch_rng(seed)
        noise_nd = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64).to(
            self.mean.device
        )
        return (self.mean + (noise_nd * self.values.sqrt()) @ self.vectors.T).float()
