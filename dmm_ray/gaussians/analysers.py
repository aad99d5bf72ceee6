"""Fitting a mixture of factor analysers: centroids, each with a few directions of its own and a diagonal rest.

Classification EM from k-means. A component's factors are the maximum-likelihood solution of factor analysis by
alternation (Joereskog 1967): given the diagonal rest, they are the leading eigenvectors of the rescaled covariance,
found by subspace iteration on the component's rows, so that no (D, D) matrix is made. The published rival of sparse
autoencoders (arXiv 2602.02464) is this model fitted by gradient steps.
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
"""Each component's covariance is averaged with the pooled diagonal as if that came from this many rows."""
ALTERNATIONS = 3
"""In each M-step, which goes on from the factors of the one before: with three of those, 12 in all converge."""
POWER_STEPS = 2
EXTRA_DIRECTIONS = 8
"""Beyond the rank, for the subspace iteration to converge."""


def fit_analysers(
    z: Tensor,
    clusters: Clusters,
    rank: int,
    pooled_rows: float = COVARIANCE_POOLED_ROWS,
    em_steps: int = EM_STEPS,
    seed: int = 0,
) -> GaussianMixture:
    """The mixture of factor analysers after ``em_steps`` of classification EM over the rows.

    Args:
        z: (N, D) training rows.
        clusters: where it starts, one component each.
        rank: factors of each component, at most D - 1 are used.
        pooled_rows: weight of the pooled diagonal in each component's covariance.
        em_steps: passes over the rows, after the one that gives every row to its nearest centre.
        seed: of the subspace iteration's start.
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
    """The M-step, from the factors of the one before; components with fewer than two rows, without spread, go."""
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
    """Factors (R, D) and the diagonal rest (D,) of centred rows x (n, D).

    Of the covariance ``(x^T x + p diag(pooled)) / (n + p)``, with p ``pooled_rows``. ``before`` are the factors and the
    rest to go on from.
    """
    n = len(x) + pooled_rows
    diagonal_D = (x.square().sum(0) + pooled_rows * pooled_D) / n
    rest_D, span_DQ = diagonal_D.clamp_min(VARIANCE_FLOOR), start_DQ
    if before is not None:
        factors_RD, rest_D = before
        known_DR = (factors_RD / rest_D.sqrt()).T
        # A little of the random start keeps directions apart whose factor has vanished.
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
        strength_R = (values[-rank:] - 1).clamp_min(0).sqrt()
        factor_DR = (span_DQ @ turn[:, -rank:]) / scale_D1 * strength_R
        rest_D = (diagonal_D - factor_DR.square().sum(1)).clamp_min(VARIANCE_FLOOR)
    return factor_DR.T.contiguous(), rest_D
