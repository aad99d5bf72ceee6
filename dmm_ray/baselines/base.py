"""The interface of the baseline denoisers, and the pieces they share.

Everything here is in normalised space. Shapes: n rows, d dimensions, k components or latents.
Path: ``z_u = (1 - u) z + u * noise`` with standard normal noise; the velocity is ``noise - z``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dmm_ray.gaussians.levels import levels_of

FLOOR = 1e-4
"""Smallest variance of a fitted density in any direction (in normalised space, where the data's is about 1)."""


class BaselineDenoiser(Protocol):
    """A method that restores noised rows."""

    seconds: float
    """What fitting it took, everything that was tried for it included."""

    @property
    def n_parameters(self) -> int:
        """Numbers that were fitted."""
        ...

    @property
    def flops_per_row(self) -> int:
        """Of a velocity: two for a multiplication with its addition."""
        ...

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """The method's estimate (n, d) of ``E[noise - z | z_u = z_nd]``."""
        ...

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """The method's estimate (n, d) of ``E[z | z_u = z_nd]``."""
        ...


class Density(BaselineDenoiser, Protocol):
    """A denoiser that is also a density."""

    def log_prob(self, z_nd: Tensor) -> Tensor:
        """Log density (n,) in nats of normalised rows."""
        ...

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n`` rows (n, d) of the fitted distribution."""
        ...


def velocity_from_mean(z_nd: Tensor, x0_nd: Tensor, u: Tensor | float) -> Tensor:
    """The velocity ``(z_u - x0) / u`` implied by an estimate ``x0`` of the clean row; ``-x0`` where it is 0/0."""
    u_n1 = levels_of(u, len(z_nd), z_nd.device)[:, None]
    return torch.where(u_n1 > 0, (z_nd - x0_nd) / u_n1.clamp_min(1e-12), -x0_nd)
