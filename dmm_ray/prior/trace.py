"""The divergence of a velocity field: exact by forward mode, or by Hutchinson's estimator with fresh probes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmm_ray.prior.noise import rademacher

Field = Callable[[Tensor], Tensor]
TRACE_STREAM = 1 << 32
"""Noise streams from here on are trace probes; below are path noises."""


def _quadratic_forms(field: Field, z: Tensor, probes_KND: Tensor) -> Tensor:
    """``e^T J e`` (K, n) for K probes a row, J the Jacobian of ``field`` at that row; the primal runs once."""

    def one(probe_ND: Tensor) -> Tensor:
        return (torch.func.jvp(field, (z,), (probe_ND,))[1] * probe_ND).sum(1)

    return torch.vmap(one)(probes_KND)


def exact_trace(field: Field, z: Tensor, chunk: int) -> Tensor:
    """``tr J`` (n,) at rows z (n, d), ``chunk`` Jacobian columns at a time, in float64."""
    n, d = z.shape
    total = torch.zeros(n, dtype=torch.float64, device=z.device)
    identity = torch.eye(d, dtype=z.dtype, device=z.device)
    for columns in identity.split(chunk):
        probes = columns[:, None].expand(-1, n, -1)
        total += _quadratic_forms(field, z, probes).double().sum(0)
    return total


def hutchinson_trace(
    field: Field, z: Tensor, ids: Tensor, seed: int, step: int, probes: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Hutchinson's estimate of ``tr J`` with Rademacher probes fresh for this evaluation.

    Probes held along the path, the habit of FFJORD, have errors that add up over the steps; fresh ones average out.

    Args:
        field: (n, d) -> (n, d).
        z: rows (n, d).
        ids: their identities (n, 2): a probe is a function of (seed, step, number, identity).
        seed: any integer.
        step: index of the evaluation.
        probes: how many.
        chunk: how many at a time.

    Returns:
        The mean over probes (n,) and the variance of that mean (n,), NaN for a single probe; float64.
    """
    forms = []
    for start in range(0, probes, chunk):
        signs = [
            rademacher(seed, ids, z.shape[1], stream=TRACE_STREAM * (step + 1) + k)
            for k in range(start, min(start + chunk, probes))
        ]
        forms.append(_quadratic_forms(field, z, torch.stack(signs)))
    forms_KN = torch.cat(forms).double()
    if probes == 1:
        return forms_KN[0], torch.full_like(forms_KN[0], torch.nan)
    return forms_KN.mean(0), forms_KN.var(0) / probes
