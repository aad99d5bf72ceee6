"""Log-likelihood by integrating the flow to noise, with its parts and percentiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_ray.arguments import as_integer
from dmm_ray.errors import UserError
from dmm_ray.prior.calibration import Calibration, Percentiles
from dmm_ray.prior.precision import as_asked
from dmm_ray.prior.rows import RowChunk
from dmm_ray.prior.solver import Solver
from dmm_ray.prior.trace import exact_trace, hutchinson_trace
from dmm_ray.prior.velocities import VelocityField

EXACT_TRACE_MAX_D = 512
"""Largest width at which ``probes=0`` is allowed by default: it costs d tangents per evaluation."""
TANGENTS = 8
"""Most tangents computed at once."""


class PercentileContext(NamedTuple):
    """What percentiles are looked up with: a calibration, the rows' layer and their positions (n,) if known."""

    calibration: Calibration | None
    layer: int
    positions: Tensor | None

    def percentiles(self, nats: Tensor, base: Tensor, norm: Tensor) -> Percentiles | None:
        """Percentiles from log p, its base and ``|z|^2``, (n,) each; None without a calibration of the layer."""
        if self.calibration is None or self.layer not in self.calibration.layers:
            return None
        return self.calibration.percentiles(self.layer, nats, base, norm, self.positions)


class Path(NamedTuple):
    """Results of integrating rows to noise, (n,) float64 each."""

    base: Tensor
    """``log N(z_1; 0, I)``."""
    divergence: Tensor
    """Integral of the velocity's divergence."""
    stderr: Tensor
    """Standard error of the integral, from the trace estimate."""
    squared_norm: Tensor
    """``|z_0|^2``."""

    @classmethod
    def joined(cls, parts: Sequence[Path]) -> Path:
        """Concatenate the results of consecutive rows."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class LogProb:
    """Log-likelihood of n raw activations and its parts; tensors are (n,) float32, in nats."""

    nats: Tensor
    """log p(x), including the normaliser's log-determinant: base + divergence + log_determinant."""
    nats_per_dim: Tensor
    """``nats / d``."""
    stderr: Tensor | None
    """Standard error of ``nats`` due to the trace estimate; zero if exact, None with a single probe."""
    percentile: Tensor | None
    """Percentage of natural activations less likely than this one; None for a prior without calibration."""
    latent_percentile: Tensor | None
    """Two-sided percentile of the latent norm at u = 1; None for a prior without calibration."""
    combined_percentile: Tensor | None
    """Percentile of these two and the row's own norm combined, small if any is unusual; None without calibration."""
    base: Tensor
    """log N(z_1; 0, I) of the latent that the row flows to."""
    divergence: Tensor
    """Integral over u of the velocity's divergence along the path."""
    log_determinant: float
    """log |dz/dx| of the normaliser."""
    evaluations: int
    """Network evaluations per row: stages x steps, not counting traces."""

    @classmethod
    def of(
        cls,
        path: Path,
        log_determinant: float,
        d: int,
        probes: int,
        evaluations: int,
        scale: PercentileContext,
    ) -> LogProb:
        """Build it from the results along the path."""
        nats = path.base + path.divergence + log_determinant
        found = scale.percentiles(nats, path.base, path.squared_norm)
        return cls(
            nats=nats.float(),
            nats_per_dim=(nats / d).float(),
            stderr=None if probes == 1 else path.stderr.float(),
            percentile=found.percentile if found else None,
            latent_percentile=found.latent_percentile if found else None,
            combined_percentile=found.combined_percentile if found else None,
            base=path.base.float(),
            divergence=path.divergence.float(),
            log_determinant=log_determinant,
            evaluations=evaluations,
        )


def check_probes(probes: int, d: int, exact_limit: int) -> int:
    """``probes`` as an int. Raises UserError for negative ones, or an exact trace beyond ``exact_limit``."""
    probes = as_integer("probes", probes)
    if probes < 0:
        raise UserError(f"probes: at least 1 is needed, or 0 for the exact trace (got {probes})")
    if probes == 0 and d > exact_limit:
        raise UserError(
            f"probes: 0, the exact trace, costs {d} tangents per evaluation at width {d}; "
            f"give at least 1, or exact_limit={d} to allow it"
        )
    return probes


def tangents_at_once(probes: int, d: int) -> int:
    """Number of tangents computed at once, out of ``probes`` or d."""
    return min(probes or d, TANGENTS)


def integrate_log_prob(
    field: VelocityField, piece: RowChunk, solver: Solver, points: list[float], seed: int, probes: int
) -> Path:
    """Integrate rows along ``points``.

    ``log p(z_0) = log N(z_1; 0, I) + integral_0^1 div v(z_u, u) du`` (Chen et al. 2018).
    """
    chunk = tangents_at_once(probes, piece.z.shape[1])

    def traced(z: Tensor, u: float, number: int) -> tuple[Tensor, Tensor, Tensor]:
        def along(s: Tensor, t_KND: Tensor) -> tuple[Tensor, Tensor]:
            return field.network_tangents(s, u, t_KND)

        if probes == 0:
            v, divergence, variance = exact_trace(along, z, chunk)
        else:
            v, divergence, variance = hutchinson_trace(along, z, piece.ids, seed, number, probes, chunk)
        if field.base is None:
            return v, divergence, variance
        # The base's divergence is exact: probes are spent on the network alone.
        base_v, base_divergence = field.base.at(u).velocity_and_divergence(z)
        return v + base_v, divergence + base_divergence, variance

    with as_asked(piece.z.device):  # covers the trace's sums as well as the field's products
        z_1, divergence, variance = solver.integrate_with_trace(field, traced, piece.z, points)
    base = -0.5 * (z_1.double().square().sum(1) + z_1.shape[1] * math.log(2 * math.pi))
    return Path(base, divergence, variance.sqrt(), piece.z.double().square().sum(1))
