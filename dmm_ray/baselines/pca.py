"""PCA: the leading components that explain a share of the variance, and the optimal denoiser in their span."""

from __future__ import annotations

import time
from typing import Self

import torch
from torch import Tensor

from dmm_ray.baselines.base import velocity_from_mean
from dmm_ray.gaussians import mean_and_covariance
from dmm_ray.gaussians.levels import levels_of, shrink
from dmm_ray.seeds import torch_rng


class PCA:
    """A Gaussian on the span of the first k components; outside the span, rows equal the mean.

    It has no density in d dimensions unless k = d, so it offers no log-probability.
    """

    def __init__(self, mean_d: Tensor, values_k: Tensor, vectors_dk: Tensor, seconds: float = 0.0) -> None:
        self.mean = mean_d
        self.values = values_k
        self.vectors = vectors_dk
        self.seconds = seconds
        self.n_parameters = mean_d.numel() + vectors_dk.numel() + values_k.numel()
        self.flops_per_row = 4 * vectors_dk.numel()

    @property
    def components(self) -> int:
        """The number of components kept."""
        return len(self.values)

    @classmethod
    def fit(cls, z_nd: Tensor, share: float = 0.95) -> Self:
        """Keep the fewest components that explain ``share`` of the training rows' variance (1.0 keeps all).

        Example:
            >>> rows = torch.randn(500, 3) * torch.tensor([1.0, 1.0, 0.01])
            >>> PCA.fit(rows).components
            2
        """
        start = time.perf_counter()
        mean_d, covariance_dd = mean_and_covariance(z_nd)
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        values_d, vectors_dd = values_d.flip(0).clamp_min(0), vectors_dd.flip(1)
        held_d = values_d.cumsum(0) / values_d.sum().clamp_min(1e-30)
        k = len(values_d) if share >= 1 else min(int((held_d < share).sum()) + 1, len(values_d))
        return cls(mean_d, values_d[:k], vectors_dd[:, :k], time.perf_counter() - start)

    def reconstruct(self, z_nd: Tensor) -> Tensor:
        """The plain projection (n, d) of clean rows onto the components."""
        centred_nd = z_nd.double() - self.mean
        return (centred_nd @ self.vectors @ self.vectors.T + self.mean).to(z_nd.dtype)

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """The Gaussian's posterior mean in the span of the components, the mean outside it."""
        u_n1 = levels_of(u_n, len(z_nd), z_nd.device).double()[:, None]
        rotated_nk = (z_nd.double() - (1 - u_n1) * self.mean) @ self.vectors
        return ((rotated_nk * shrink(self.values, u_n1)) @ self.vectors.T + self.mean).to(z_nd.dtype)

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``(z_u - x0) / u`` with the posterior mean as x0: whatever it leaves out counts as noise."""
        return velocity_from_mean(z_nd, self.posterior_mean(z_nd, u_n), u_n)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw ``n`` rows (n, d), float32, all in the span of the components."""
        generator = torch_rng(seed)
        noise_nk = torch.randn(n, self.components, generator=generator, dtype=torch.float64).to(
            self.mean.device
        )
        return (self.mean + (noise_nk * self.values.sqrt()) @ self.vectors.T).float()
