"""The interface of the baseline denoisers, and the pieces they share.

Everything here is in normalised space. Shapes: n rows, d dimensions, k components or latents.
Path: ``z_u = (1 - u) z + u * noise`` with standard normal noise; the velocity is ``noise - z``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dmm_ray.seeds import torch_rng

FLOOR = 1e-4
"""Smallest variance of a fitted density in any direction (in normalised space, where the data's is about 1)."""


class BaselineDenoiser(Protocol):
    """A method that denoises rows; ``n_parameters`` and ``seconds`` are its size and fitting time."""

    n_parameters: int
    seconds: float

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


def levels_of(u: Tensor | float, n: int, device: torch.device) -> Tensor:
    """``u`` as (n,) float32 noise levels on ``device``."""
    return torch.as_tensor(u, dtype=torch.float32, device=device).expand(n)


def map_levels(z_nd: Tensor, u: Tensor | float, fn: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Apply ``fn(rows, level)`` to the rows of each distinct level and return the results in the original order."""
    values, which_n = torch.unique(levels_of(u, len(z_nd), z_nd.device), return_inverse=True)
    if len(values) == 1:
        return fn(z_nd, float(values[0]))
    order_n = torch.argsort(which_n, stable=True)
    groups = z_nd[order_n].split(torch.bincount(which_n, minlength=len(values)).tolist())
    out_nd = torch.empty_like(z_nd)
    out_nd[order_n] = torch.cat([fn(rows, float(level)) for rows, level in zip(groups, values, strict=True)])
    return out_nd


def velocity_from_mean(z_nd: Tensor, x0_nd: Tensor, u: Tensor | float) -> Tensor:
    """The velocity ``(z_u - x0) / u`` implied by an estimate ``x0`` of the clean row; ``-x0`` where it is 0/0."""
    u_n1 = levels_of(u, len(z_nd), z_nd.device)[:, None]
    return torch.where(u_n1 > 0, (z_nd - x0_nd) / u_n1.clamp_min(1e-12), -x0_nd)


def gain(variance: Tensor, u: Tensor | float) -> Tensor:
    """``C(u) = (u - (1 - u) v) / ((1 - u)^2 v + u^2)``, elementwise.

    For ``z ~ N(m, v)`` the optimal velocity is ``-m + C(u) (z_u - (1 - u) m)``: no division by u, exact at u = 0
    (``-z``) and u = 1 (``z_u - m``).
    """
    return (u - (1 - u) * variance) / ((1 - u) ** 2 * variance + u * u)


def shrink(variance: Tensor, u: Tensor | float) -> Tensor:
    """``S(u) = (1 - u) v / ((1 - u)^2 v + u^2)``: for ``z ~ N(m, v)``, ``E[z | z_u] = m + S(u) (z_u - (1 - u) m)``."""
    return (1 - u) * variance / ((1 - u) ** 2 * variance + u * u).clamp_min(1e-30)


def validation_loss(method: BaselineDenoiser, z_nd: Tensor, levels: int = 50, seed: int = 0) -> float:
    """Flow-matching loss per dimension with fixed noise, rows spread evenly over ``levels`` midpoints of [0, 1]."""
    generator = torch_rng(seed)
    noise_nd = torch.randn(z_nd.shape, generator=generator).to(z_nd.device)
    u_n = (torch.arange(len(z_nd), device=z_nd.device) % levels + 0.5) / levels
    noised_nd = (1 - u_n[:, None]) * z_nd + u_n[:, None] * noise_nd
    return float((method.velocity(noised_nd, u_n) - (noise_nd - z_nd)).square().mean())
