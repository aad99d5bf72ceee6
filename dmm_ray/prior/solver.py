"""Fixed-grid Runge-Kutta integration of the flow between noise levels.

On a fixed grid a row's result is independent of the rest of its batch; with an adaptive error norm over the batch it
would not be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_ray.arguments import as_integer, as_number
from dmm_ray.errors import UserError
from dmm_ray.operations import Grid, Method

Velocity = Callable[[Tensor, float], Tensor]
"""(states (n, d), u) -> velocities (n, d)."""
Traced = Callable[[Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
"""(states, u, index of the trace along the path) -> velocities (n, d), an estimate (n,) of their divergence and the
variance (n,) of that estimate."""


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: its stages' nodes within an interval, their coefficients and their weights."""

    nodes: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUX: dict[str, Tableau] = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


@dataclasses.dataclass(frozen=True)
class Solver:
    """A Runge-Kutta method on a fixed grid of noise levels.

    Attributes:
        method: ``euler``, ``midpoint``, ``heun`` or ``rk4`` (Hairer, Norsett and Wanner 1993, section II.1).
        grid: ``cosine``, dense at both ends, where the velocity bends most, or ``uniform``.

    Raises:
        UserError: an unknown method or grid.
    """

    method: Method = "midpoint"
    grid: Grid = "cosine"

    def __post_init__(self) -> None:
        if self.method not in TABLEAUX:
            raise UserError(f"solver: expected method {', '.join(TABLEAUX)} (got {self.method!r})")
        if self.grid not in ("cosine", "uniform"):
            raise UserError(f"solver: expected grid cosine or uniform (got {self.grid!r})")

    @property
    def stages(self) -> int:
        """Network evaluations per interval."""
        return len(self.tableau.nodes)

    @property
    def tableau(self) -> Tableau:
        """The method's coefficients."""
        return TABLEAUX[self.method]

    def points(self, start: float, stop: float, steps: int) -> list[float]:
        """The ``steps + 1`` levels of the grid; ``(1 - cos(pi k / steps)) / 2`` or ``k / steps`` of the way.

        Raises:
            UserError: fewer than one step, or levels outside [0, 1].
        """
        steps = as_integer("steps", steps, least=1)
        for u in (start, stop):
            check_level(u)
        way = [k / steps for k in range(steps + 1)]
        if self.grid == "cosine":
            way = [(1 - math.cos(math.pi * w)) / 2 for w in way]
        return [start + (stop - start) * w for w in way]

    def integrate(self, velocity: Velocity, z: Tensor, points: list[float]) -> Tensor:
        """Integrate the state z (n, d) from the first of ``points`` to the last."""
        for a, b in pairwise(points):
            slopes: list[Tensor] = []
            for k in range(self.stages):
                slopes.append(velocity(self._stage(k, z, b - a, slopes), self._level(k, a, b)))
            z = _combine(z, b - a, self.tableau.weights, slopes)
        return z

    def integrate_with_trace(
        self, velocity: Velocity, traced: Traced, z: Tensor, points: list[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like :meth:`integrate`, with ``integral of div v du`` along the path by the same rule.

        Stages of zero weight need no trace: midpoint computes it at only half of its evaluations.

        Args:
            velocity: used where no trace is needed.
            traced: used where one is needed.
            z: states (n, d) at the first of ``points``.
            points: see :meth:`points`.

        Returns:
            The end state (n, d), the integral (n,) and the variance (n,) of its estimate, the last two in float64.
        """
        total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        variance, traces = torch.zeros_like(total), 0
        for a, b in pairwise(points):
            slopes: list[Tensor] = []
            for k, weight in enumerate(self.tableau.weights):
                state, u = self._stage(k, z, b - a, slopes), self._level(k, a, b)
                if weight == 0:
                    slopes.append(velocity(state, u))
                    continue
                slope, estimate, spread = traced(state, u, traces)
                slopes.append(slope)
                total += (b - a) * weight * estimate
                variance += ((b - a) * weight) ** 2 * spread
                traces += 1
            z = _combine(z, b - a, self.tableau.weights, slopes)
        return z, total, variance

    def _stage(self, k: int, z: Tensor, width: float, slopes: list[Tensor]) -> Tensor:
        return _combine(z, width, self.tableau.coefficients[k], slopes)

    def _level(self, k: int, a: float, b: float) -> float:
        node = self.tableau.nodes[k]
        return b if node == 1 else a + node * (b - a)


def _combine(z: Tensor, width: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            z = z + width * weight * slope
    return z


def check_level(u: float) -> None:
    """Raises UserError unless u is a noise level in [0, 1]."""
    if not 0.0 <= as_number("u", u) <= 1.0:
        raise UserError(f"u: expected a noise level in [0, 1], 0 data and 1 noise (got {u})")
