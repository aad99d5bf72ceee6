"""Distributions with density and flow in closed form, and small priors trained on them, for measuring the errors of the
solver and the estimator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.flow import batch_levels, interpolate

Shape = tuple[int, int, int]
"""Model width, MLP width, blocks."""


class Mixture:
    """An equally weighted mixture of diagonal Gaussians; with a single component, a Gaussian of known covariance.

    Args:
        means: (K, d).
        variances: (K, d).
    """

    def __init__(self, means: Tensor, variances: Tensor) -> None:
        self.means, self.variances = means.double(), variances.double()

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.means.shape[1]

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Rows (n, d) float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.d, generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (n,)."""
        return self._joint(z, 0.0).logsumexp(1)

    def velocity(self, z: Tensor, u: float) -> Tensor:
        """``E[noise - z | z_u]`` (n, d)."""
        return self.velocity_and_trace(z, u)[0]

    def velocity_and_trace(self, z: Tensor, u: float, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The velocity, its exact divergence (n,), and zeros, as the solver expects them.

        With v_k = a_k (z - (1 - u) m_k) - m_k for component k and r_k its posterior probability, ``v = sum r_k v_k``
        and ``div v = sum r_k (tr a_k + (g_k - sum r_j g_j) v_k)``, where g_k is the gradient of its log-density.
        """
        spread = (1 - u) ** 2 * self.variances + u**2
        slope = (u - (1 - u) * self.variances) / spread
        off_nKd = z[:, None] - (1 - u) * self.means
        share = self._joint(z, u).softmax(1)[:, :, None]
        v_nKd, g_nKd = slope * off_nKd - self.means, -off_nKd / spread
        bend = ((g_nKd - (share * g_nKd).sum(1, keepdim=True)) * v_nKd).sum(2)
        divergence = (share[:, :, 0] * (slope.sum(1) + bend)).sum(1)
        return (share * v_nKd).sum(1), divergence, torch.zeros_like(divergence)

    def _joint(self, z: Tensor, u: float) -> Tensor:
        spread = (1 - u) ** 2 * self.variances + u**2
        square = (z[:, None] - (1 - u) * self.means).square() / spread
        return -0.5 * (square + spread.log() + math.log(2 * math.pi)).sum(2) - math.log(len(self.means))


def power_law(d: int) -> Tensor:
    """Variances (d,) that decay as a power law, with mean 1."""
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    return values * d / values.sum()


def gaussian(d: int) -> Mixture:
    """A Gaussian with a power-law spectrum."""
    return Mixture(torch.zeros(1, d), power_law(d)[None])


def mixture(d: int, components: int, seed: int = 0) -> Mixture:
    """Components with power-law variances, whose means have one too; 80 % of the variance is between components."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, generator=generator, dtype=torch.float64) * (0.8 * power_law(d)).sqrt()
    order = torch.stack([torch.randperm(d, generator=generator) for _ in range(components)])
    return Mixture(means, 0.2 * power_law(d)[order])


def trained(data: Mixture, shape: Shape, batches: int, batch: int = 512) -> tuple[ActivationPrior, Tensor]:
    """A prior trained briefly on randomly rotated rows of ``data``, and 4,000 such rows not used for training."""
    d = data.d
    turn = torch.linalg.qr(
        torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = (data.sample(20_000) @ turn).float().to(device)
    var, mean = torch.var_mean(rows, dim=0)
    config = PriorConfig(
        d=d, layers=(0,), d_model=shape[0], d_mlp=shape[1], n_blocks=shape[2], variance_floor=1e-6
    )
    prior = ActivationPrior.untrained(config, mean.cpu(), var.cpu()).to(device)
    _train(prior, prior.normalizer.normalize(rows), batches, batch)
    return prior, (data.sample(4000, seed=1) @ turn).float().to(device)


def _train(prior: ActivationPrior, z: Tensor, batches: int, batch: int) -> None:
    prior.denoiser.requires_grad_(True)
    generator = torch.Generator(z.device).manual_seed(2)
    optimizer = torch.optim.AdamW(prior.denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=batches)
    for k in range(batches):
        rows = z[torch.randint(len(z), (batch,), generator=generator, device=z.device)]
        noise = torch.randn(rows.shape, generator=generator, device=z.device)
        levels = batch_levels(0, k, 64).to(z.device)
        z_u = interpolate(rows, noise, levels.repeat_interleave(batch // 64))
        loss = (prior.denoiser(z_u, levels) - (noise - rows)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    prior.denoiser.requires_grad_(False)


def spread(values: Tensor) -> float:
    """Standard deviation of ``values`` (n,)."""
    return float(values.double().std())
