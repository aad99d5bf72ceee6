"""A prior whose velocity is known in closed form: the flow of a Gaussian to standard noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.normalizer import Normalizer


class GaussianVelocity(nn.Module):
    """``E[noise - z | z_u]`` for z ~ N(0, covariance): linear in z_u, diagonal in the eigenbasis of the covariance."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        self.in_proj = nn.Linear(1, 1)
        values, vectors = torch.linalg.eigh(covariance.double())
        self.values, self.vectors = values, vectors

    def gates(self, u_M: Tensor, depth_M: Tensor | None = None) -> list[Tensor]:
        """The slopes of the velocity along the eigenvectors at each level (M, d)."""
        u = u_M.double()[:, None]
        slopes = (u - (1 - u) * self.values) / ((1 - u) ** 2 * self.values + u**2)
        return [slopes]

    def velocity(self, z_BD: Tensor, gates: list[Tensor], index_B: Tensor | None = None) -> Tensor:
        """The velocity (B, D)."""
        slopes = gates[0] if index_B is None else gates[0][index_B]
        along = z_BD @ self.vectors.to(z_BD.dtype)
        return (along * slopes.to(z_BD.dtype)) @ self.vectors.T.to(z_BD.dtype)

    def tangents(self, z_BD: Tensor, gates: list[Tensor], t_KBD: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and that of the tangents: it is linear."""
        return self.velocity(z_BD, gates), self.velocity(t_KBD, gates)

    def meta_neurons(self, z_BD: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """The velocity stands for the hidden units."""
        return [self.velocity(z_BD, gates)]


class PowerLawVelocity(GaussianVelocity):
    """The same for a diagonal covariance: no product with the eigenvectors, for large d."""

    def __init__(self, values: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_proj = nn.Linear(1, 1)
        self.values = values.double()

    def velocity(self, z_BD: Tensor, gates: list[Tensor], index_B: Tensor | None = None) -> Tensor:
        """The velocity (B, D)."""
        slopes = gates[0] if index_B is None else gates[0][index_B]
        return z_BD * slopes.to(z_BD.dtype)


def power_law(d: int, exponent: float = 1.0) -> Tensor:
    """Eigenvalues (d,) that fall as a power of their rank, of mean 1: the spectrum of activations, roughly."""
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -exponent
    return values * d / values.sum()


def random_covariance(d: int, seed: int = 0) -> Tensor:
    """A covariance with eigenvalues from 0.05 to 5 and mean variance about 1."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    values = torch.logspace(math.log10(0.05), math.log10(5.0), d, dtype=torch.float64)
    return (vectors * values) @ vectors.T


def gaussian_prior(
    covariance: Tensor, mean: Tensor | None = None, scale: Tensor | None = None
) -> ActivationPrior:
    """The exact prior of x = mean + scale * z with z ~ N(0, covariance)."""
    return closed_form_prior(GaussianVelocity(covariance), len(covariance), mean, scale)


def power_law_prior(values: Tensor) -> ActivationPrior:
    """The exact prior of x ~ N(0, diag(values))."""
    return closed_form_prior(PowerLawVelocity(values), len(values))


def closed_form_prior(
    velocity: GaussianVelocity, d: int, mean: Tensor | None = None, scale: Tensor | None = None
) -> ActivationPrior:
    """The prior of x = mean + scale * z, where ``velocity`` is that of z (n, d)."""
    mean = torch.zeros(d) if mean is None else mean
    scale = torch.ones(d) if scale is None else scale
    config = PriorConfig(d=d, layers=(3,), d_model=2, d_mlp=2, n_blocks=1, variance_floor=1e-12)
    normalizer = Normalizer(mean[None], scale.square()[None], 1e-12)
    return ActivationPrior(config, velocity, normalizer)  # type: ignore[arg-type]
