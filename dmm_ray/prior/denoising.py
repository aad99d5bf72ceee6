"""Noising rows to a level and restoring them, and finding the level that stays within a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.gaussians.levels import map_levels
from dmm_ray.operations import Mode
from dmm_ray.prior.flow import interpolate, posterior_mean
from dmm_ray.prior.solver import Solver
from dmm_ray.prior.velocities import VelocityField

DISTANCE_LEVELS = 32
"""The levels searched for a distance are the multiples of 1 / DISTANCE_LEVELS."""


def check_mode(mode: str) -> None:
    """Raises UserError for a mode other than sample or mean."""
    if mode not in ("sample", "mean"):
        raise UserError(f"mode: expected 'sample' or 'mean' (got {mode!r})")


def row_levels(u: Any, n: int) -> Tensor:
    """One noise level per row, (n,) float64 on the CPU, from a number or (n,).

    Raises:
        UserError: wrong length, or a level outside [0, 1].
    """
    try:
        levels = torch.as_tensor(u, dtype=torch.float64, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"u: expected one number or {n} of them (got {u!r})") from e
    if len(levels) not in (1, n):
        raise UserError(f"u: expected one noise level or one per row, got {len(levels)} for {n} rows")
    good = (levels >= 0) & (levels <= 1)
    if not good.all():
        bad = float(levels[~good][0])
        raise UserError(f"u: expected a noise level in [0, 1], 0 data and 1 noise (got {bad:g})")
    return levels.expand(n)


class Restorer:
    """Restores rows noised to any level.

    Args:
        field: the velocity field.
        solver: for mode ``sample``.
        steps: its steps from the level to 0.
        mode: ``sample`` follows the flow, ``mean`` takes E[z | z_u].

    Raises:
        UserError: an unknown mode, or fewer than one step.
    """

    def __init__(self, field: VelocityField, solver: Solver, steps: int, mode: Mode = "sample") -> None:
        check_mode(mode)
        solver.points(1.0, 0.0, steps)
        self.field, self.solver, self.steps, self.mode = field, solver, steps, mode

    def at(self, z: Tensor, noise: Tensor, u: float) -> Tensor:
        """Noise rows z (m, d) to level u with ``noise`` (m, d) and restore them; z itself at u = 0."""
        if u == 0:
            return z
        z_u = interpolate(z, noise, u)
        if self.mode == "mean":
            return posterior_mean(z_u, self.field(z_u, u), u)
        return self.solver.integrate(self.field, z_u, self.solver.points(u, 0.0, self.steps))

    def at_levels(self, z: Tensor, noise: Tensor, u_M: Tensor) -> Tensor:
        """Like :meth:`at` with one level per row, u (m,); rows at the same level are solved together."""
        return map_levels(u_M, lambda u, rows, noises: self.at(rows, noises, u), z, noise)


def largest_levels(restore: Callable[[Tensor], Tensor], z: Tensor, distance: float) -> Tensor:
    """For each row, a multiple of 1 / DISTANCE_LEVELS whose result is within ``distance``, by bisection; (m,) float64.

    If the distance ``|restored - z| / |z|`` grows with the level, it is the largest such level; in any case the result
    at that level was within the budget, and a row's level depends on that row alone.

    Args:
        restore: levels (m,) float64 on the CPU -> rows (m, d).
        z: rows (m, d), normalised.
        distance: budget; a row at the mean (z = 0) gets level 0.
    """
    allowed = distance * z.norm(dim=1)
    low = np.zeros(len(z), dtype=np.int64)
    high = np.full(len(z), DISTANCE_LEVELS + 1)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        moved = (restore(torch.from_numpy(middle / DISTANCE_LEVELS)) - z).norm(dim=1)
        within = (moved <= allowed).numpy(force=True)
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    return torch.from_numpy(low / DISTANCE_LEVELS)
