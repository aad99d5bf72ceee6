"""A single Gaussian with full covariance."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dmm_ray.gaussians.diagonal import VARIANCE_FLOOR
from dmm_ray.gaussians.mixture import GaussianMixture

COVARIANCE_CHUNK = 65536


def mean_and_covariance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the rows (N, D) in float64, accumulated in chunks."""
    mean_D = torch.stack([chunk.double().sum(0) for chunk in z.split(COVARIANCE_CHUNK)]).sum(0) / len(z)
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=z.device)
    for chunk in z.split(COVARIANCE_CHUNK):
        centred = chunk.double() - mean_D
        covariance_DD += centred.T @ centred
    return mean_D, covariance_DD / max(len(z) - 1, 1)


def fit_gaussian(z: Tensor) -> GaussianMixture:
    """Fit one Gaussian to the rows (N, D), as a one-component mixture in the eigenbasis of its covariance.

    Example:
        >>> fit_gaussian(torch.randn(500, 3)).components
        1
    """
    start = time.perf_counter()
    mean_D, covariance_DD = mean_and_covariance(z)
    values_D, basis_DD = torch.linalg.eigh(covariance_DD)
    found = GaussianMixture(
        torch.ones(1, dtype=z.dtype, device=z.device),
        (mean_D @ basis_DD).to(z.dtype)[None],
        values_D.clamp_min(VARIANCE_FLOOR).to(z.dtype)[None],
        basis=basis_DD.to(z.dtype).contiguous(),
    )
    found.seconds = time.perf_counter() - start
    return found
