"""The divergence of a velocity field: exact, or by Hutchinson's estimator with fresh probes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmm_ray.prior.noise import rademacher

Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z (n, d), tangents (K, n, d)) -> the velocity (n, d) and its derivatives along each of the tangents (K, n, d)."""
TRACE_STREAM = 1 << 32
"""Noise streams from here up are trace probes; those below are path noise."""


def _quadratic_forms(field: Field, z: Tensor, probes_KND: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity (n, d) and ``e^T J e`` (K, n) in float64 for K probes per row, J the Jacobian at that row."""
    velocity, along_KND = field(z, probes_KND)
    return velocity, torch.linalg.vecdot(along_KND, probes_KND).double()


def exact_trace(field: Field, z: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The velocity (n, d) at rows z (n, d), ``tr J`` (n,) there and its variance, zero; float64.

    Costs d tangents, ``chunk`` of them at a time.
    """
    n, d = z.shape
    total = torch.zeros(n, dtype=torch.float64, device=z.device)
    velocity = z
    for columns in torch.eye(d, dtype=z.dtype, device=z.device).split(chunk):
        velocity, forms = _quadratic_forms(field, z, columns[:, None].expand(-1, n, -1))
        total += forms.sum(0)
    return velocity, total, torch.zeros_like(total)


def hutchinson_trace(
    field: Field, z: Tensor, ids: Tensor, seed: int, number: int, probes: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hutchinson's estimate of ``tr J`` with Rademacher probes drawn afresh for this evaluation.

    Errors of probes held fixed along the path, as in FFJORD, add up over the steps; those of fresh ones average out.

    Args:
        field: velocity and its derivatives.
        z: rows (n, d).
        ids: their identities (n, 2): a probe is a function of (seed, number, probe index, identity).
        seed: any integer.
        number: index of the evaluation along the path.
        probes: number of probes.
        chunk: how many to compute at a time.

    Returns:
        The velocity (n, d), the mean over probes (n,) and the variance of that mean (n,), NaN for a single probe; the
        last two float64.
    """
    forms, velocity = [], z
    for start in range(0, probes, chunk):
        signs = [
            rademacher(seed, ids, z.shape[1], stream=TRACE_STREAM * (number + 1) + k).to(z.dtype)
            for k in range(start, min(start + chunk, probes))
        ]
        velocity, found = _quadratic_forms(field, z, torch.stack(signs))
        forms.append(found)
    forms_KN = torch.cat(forms)
    if probes == 1:
        return velocity, forms_KN[0], torch.full_like(forms_KN[0], torch.nan)
    return velocity, forms_KN.mean(0), forms_KN.var(0) / probes
