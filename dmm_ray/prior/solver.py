"""Fixed-grid midpoint integration of the flow between noise levels.

A fixed grid keeps a row's result independent of its batch mates, which one adaptive error norm over a batch does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_ray.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]


class Interval(NamedTuple):
    """One grid interval: its ends and its middle."""

    start: float
    middle: float
    stop: float


def cosine_grid(start: float, stop: float, steps: int) -> list[Interval]:
    """``steps`` intervals from ``start`` to ``stop``, dense at both ends: ``(1 - cos(pi k / steps)) / 2`` of the way.

    The velocity bends most near data and near noise; such a grid needs
    fewer evaluations than a uniform one.

    Raises:
        UserError: fewer than one step, or levels outside [0, 1].
    """
    if steps < 1:
        raise UserError(f"steps: at least 1 is needed (got {steps})")
    for u in (start, stop):
        check_level(u)
    way = [(1 - math.cos(math.pi * k / steps)) / 2 for k in range(steps + 1)]
    points = [start + (stop - start) * w for w in way]
    return [Interval(a, (a + b) / 2, b) for a, b in pairwise(points)]


def check_level(u: float) -> None:
    """Raises UserError unless u is a noise level in [0, 1]."""
    if not 0.0 <= u <= 1.0:
        raise UserError(f"u: a noise level in [0, 1] is needed, 0 data and 1 noise (got {u})")


def trajectory(
    velocity: Velocity, z: Tensor, grid: list[Interval]
) -> Iterator[tuple[Interval, Tensor, Tensor]]:
    """Midpoint steps along ``grid``: yields (interval, state at its middle, state at its end)."""
    for step in grid:
        middle = z + (step.middle - step.start) * velocity(z, step.start)
        z = z + (step.stop - step.start) * velocity(middle, step.middle)
        yield step, middle, z


def integrate(velocity: Velocity, z: Tensor, grid: list[Interval]) -> Tensor:
    """The state at the end of ``grid`` from the state z (n, d) at its start; two evaluations an interval."""
    end = z
    for _, _, end in trajectory(velocity, z, grid):
        pass
    return end


def integrate_with_trace(
    velocity: Velocity,
    trace: Callable[[Tensor, float, int], tuple[Tensor, Tensor]],
    z: Tensor,
    grid: list[Interval],
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`integrate`, with ``integral of div v du`` along the path by the same midpoint rule.

    Args:
        velocity: (z (n, d), u) -> (n, d).
        trace: (z, u, step index) -> estimate (n,) of the divergence there and the variance (n,) of that estimate.
        z: states at the start.
        grid: intervals.

    Returns:
        The end state (n, d), the integral (n,) and the variance (n,) of its estimate.
    """
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    variance = torch.zeros_like(total)
    end = z
    for k, (step, middle, end) in enumerate(trajectory(velocity, z, grid)):
        width = step.stop - step.start
        estimate, spread = trace(middle, step.middle, k)
        total += width * estimate
        variance += width**2 * spread
    return end, total, variance
