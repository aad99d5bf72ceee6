"""Noise levels, and the optimal denoiser of a Gaussian of known variance at one level.

Path: ``z_u = (1 - u) z + u * noise``; the velocity is ``noise - z``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gain(variance: Tensor, u: Tensor | float) -> Tensor:
    """``C(u) = (u - (1 - u) v) / ((1 - u)^2 v + u^2)``, elementwise.

    For ``z ~ N(m, v)`` the optimal velocity is ``-m + C(u) (z_u - (1 - u) m)``: no division by u, exact at u = 0
    (``-z``) and u = 1 (``z_u - m``).
    """
    return (u - (1 - u) * variance) / ((1 - u) ** 2 * variance + u * u)


def shrink(variance: Tensor, u: Tensor | float) -> Tensor:
    """``S(u) = (1 - u) v / ((1 - u)^2 v + u^2)``: for ``z ~ N(m, v)``, ``E[z | z_u] = m + S(u) (z_u - (1 - u) m)``."""
    return (1 - u) * variance / ((1 - u) ** 2 * variance + u * u).clamp_min(1e-30)


def levels_of(u: Tensor | float, n: int, device: torch.device) -> Tensor:
    """``u`` as (n,) float32 noise levels on ``device``."""
    return torch.as_tensor(u, dtype=torch.float32, device=device).expand(n)


def map_levels(u: Tensor | float, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Apply ``function(level, *rows)`` to the rows of each distinct level, and restore the order of the rows.

    Args:
        u: a number or one per row (N,), on any device.
        function: maps a level and tensors of n rows to a tensor of n rows.
        rows: (N, ...) each.
    """
    if not isinstance(u, Tensor) or u.ndim == 0:
        return function(float(u), *rows)
    values, which = torch.unique(u, return_inverse=True)
    if len(values) == 1:
        return function(float(values[0]), *rows)
    order, sizes = torch.argsort(which, stable=True), torch.bincount(which, minlength=len(values)).tolist()
    order = order.to(rows[0].device)
    groups = zip(*(part[order].split(sizes) for part in rows), strict=True)
    found = torch.cat([function(u, *group) for u, group in zip(values.tolist(), groups, strict=True)])
    return torch.empty_like(found).index_copy_(0, order, found)
