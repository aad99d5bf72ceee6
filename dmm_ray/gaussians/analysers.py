"""Fitting a mixture of factor analysers: components with a few factors each and a diagonal residual.

Classification EM, initialised by k-means. A component's factors are the maximum-likelihood solution of factor analysis,
found by alternation (Joereskog 1967): given the residual variances, they follow from the leading eigenvectors of the
rescaled covariance, which subspace iteration finds from the component's rows without forming a (D, D) matrix. The
published rival of sparse autoencoders (arXiv 2602.02464) is the same model, fitted by gradient steps.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dmm_ray.gaussians.assign import likeliest
from dmm_ray.gaussians.clusters import Clusters, assigned, gather, nearest
from dmm_ray.gaussians.diagonal import VARIANCE_FLOOR
from dmm_ray.gaussians.mixture import GaussianMixture
from dmm_ray.seeds import torch_rng

EM_STEPS = 3
COVARIANCE_POOLED_ROWS = 20.0
"""The pooled diagonal is averaged into each component's covariance with the weight of this many rows."""
ALTERNATIONS = 3
"""Per M-step, each starting from the previous factors; with EM_STEPS = 3 (four M-steps), the 12 in total converge."""
POWER_STEPS = 2
EXTRA_DIRECTIONS = 8
"""Directions beyond the rank, so that the subspace iteration converges."""


def fit_analysers(
    z: Tensor,
    clusters: Clusters,
    rank: int,
    pooled_rows: float = COVARIANCE_POOLED_ROWS,
    em_steps: int = EM_STEPS,
    seed: int = 0,
) -> GaussianMixture:
    """Fit a mixture of factor analysers by ``em_steps`` passes of classification EM over the rows.

    Args:
        z: (N, D) training rows.
        clusters: the starting point, one component per cluster.
        rank: factors per component; at most D - 1 are used.
        pooled_rows: weight of the pooled diagonal in each component's covariance, in rows.
        em_steps: passes over the rows, after the initial one that assigns each row to its nearest centre.
        seed: seed of the subspace iteration's starting directions.
    """
    start = time.perf_counter()
    rank = min(rank, z.shape[1] - 1)
    assign, k = nearest(clusters.centres @ clusters.basis), len(clusters.centres)
    turned = z @ clusters.basis
    model: GaussianMixture | None = None
    for _ in range(em_steps + 1):
        which = assigned(turned, assign)
        model = _maximised(turned, which, k, rank, pooled_rows, seed, model)
        assign, k = likeliest(model), model.components
    assert model is not None
    found = GaussianMixture(model.weights, model.means, model.variances, model.factors, clusters.basis)
    found.seconds = time.perf_counter() - start
    return found


def _maximised(
    z: Tensor,
    which: Tensor,
    k: int,
    rank: int,
    pooled_rows: float,
    seed: int,
    before: GaussianMixture | None,
) -> GaussianMixture:
    """The M-step, starting from the previous factors; drops components of fewer than two rows, which have no spread."""
    counts = torch.bincount(which, minlength=k)
    kept = (counts > 1).nonzero()[:, 0]
    sums = gather(z, which, k)
    means_KD = sums.first[kept] / counts[kept][:, None]
    pooled_D = (sums.second[kept].sum(0) - (counts[kept][:, None] * means_KD.square()).sum(0)).clamp_min(0)
    pooled_D = pooled_D / counts[kept].sum()
    groups = torch.argsort(which, stable=True).split(counts.tolist())
    directions = min(rank + EXTRA_DIRECTIONS, z.shape[1])
    start_DQ = torch.randn(z.shape[1], directions, generator=torch_rng(seed)).to(z)
    parts = [
        analyse(
            z[groups[c]] - mean_D,
            pooled_D,
            rank,
            pooled_rows,
            start_DQ,
            None if before is None else (before.factors[c], before.variances[c]),
        )
        for c, mean_D in zip(kept.tolist(), means_KD, strict=True)
    ]
    weights, factors, rests = counts[kept].to(z.dtype), [f for f, _ in parts], [rest for _, rest in parts]
    return GaussianMixture(weights / weights.sum(), means_KD, torch.stack(rests), torch.stack(factors))


def analyse(
    x: Tensor,
    pooled_D: Tensor,
    rank: int,
    pooled_rows: float,
    start_DQ: Tensor,
    before: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit factors (R, D) and residual variances (D,) to centred rows x (n, D).

    They are fitted to the covariance ``(x^T x + p diag(pooled)) / (n + p)``, where p is ``pooled_rows``. ``before``
    contains the factors and residual variances to start from.
    """
    n = len(x) + pooled_rows
    diagonal_D = (x.square().sum(0) + pooled_rows * pooled_D) / n
    rest_D, span_DQ = diagonal_D.clamp_min(VARIANCE_FLOOR), start_DQ
    if before is not None:
        factors_RD, rest_D = before
        known_DR = (factors_RD / rest_D.sqrt()).T
        # A little of the random start keeps the directions of vanished factors linearly independent.
        span_DQ = torch.cat([known_DR + 1e-3 * start_DQ[:, :rank], start_DQ[:, rank:]], dim=1)
    factor_DR = span_DQ[:, :rank]
    for _ in range(ALTERNATIONS):
        scale_D1 = rest_D.rsqrt()[:, None]

        def rescaled(directions_DQ: Tensor, scale_D1: Tensor = scale_D1) -> Tensor:
            scaled_DQ = scale_D1 * directions_DQ
            return scale_D1 * (x.T @ (x @ scaled_DQ) + pooled_rows * pooled_D[:, None] * scaled_DQ) / n

        for _ in range(POWER_STEPS):
            span_DQ = torch.linalg.qr(rescaled(span_DQ)).Q
        values, turn = torch.linalg.eigh(span_DQ.T @ rescaled(span_DQ))
        # The residual has unit variance in rescaled coordinates, so the factors account only for the excess.
        strength_R = (values[-rank:] - 1).clamp_min(0).sqrt()
        factor_DR = (span_DQ @ turn[:, -rank:]) / scale_D1 * strength_R
        rest_D = (diagonal_D - factor_DR.square().sum(1)).clamp_min(VARIANCE_FLOOR)
    return factor_DR.T.contiguous(), rest_D
