"""Fitting a mixture of diagonal Gaussians, in the rows' own axes or in the basis derived from their clusters.

Classification EM (Celeux and Govaert 1992): each row is assigned entirely to its most likely component. In the
tens of dimensions or more that activations have, this matches EM to three digits of the flow-matching loss in a sixth
of the time.
"""

from __future__ import annotations

import time

from torch import Tensor

from dmm_ray.gaussians.assign import likeliest
from dmm_ray.gaussians.clusters import Clusters, Sums, assigned, gather, nearest
from dmm_ray.gaussians.mixture import GaussianMixture

VARIANCE_FLOOR = 1e-4
"""Smallest variance of a component in any direction during fitting; the choice on validation rows may raise it."""
POOLED_ROWS = 2.0
"""The pooled within-component variance is averaged into each component's with the weight of this many rows."""
EM_STEPS = 3


def fit_diagonal(
    z: Tensor, clusters: Clusters, rotated: bool = True, em_steps: int = EM_STEPS
) -> GaussianMixture:
    """Fit a mixture of diagonal Gaussians by ``em_steps`` passes of classification EM over the rows.

    Args:
        z: (N, D) training rows.
        clusters: the starting point, one component per cluster.
        rotated: whether it is diagonal in the clusters' basis or in the rows' own axes.
        em_steps: passes over the rows, after the initial one that assigns each row to its nearest centre.

    Example:
        >>> rows = torch.cat([torch.randn(500, 2), torch.randn(500, 2) + 9])
        >>> fit_diagonal(rows, find_clusters(rows, 2)).components
        2
    """
    start = time.perf_counter()
    basis = clusters.basis if rotated else None
    assign, k = nearest(clusters.centres), len(clusters.centres)
    for _ in range(em_steps + 1):
        model = from_sums(gather(z, assigned(z, assign), k, basis), basis)
        assign, k = likeliest(model), model.components
    model.seconds = time.perf_counter() - start
    return model


def from_sums(sums: Sums, basis: Tensor | None = None) -> GaussianMixture:
    """The M-step; drops components without rows."""
    kept = sums.rows > 0
    rows_K1 = sums.rows[kept][:, None]
    means_KD = sums.first[kept] / rows_K1
    spread_KD = (sums.second[kept] / rows_K1 - means_KD.square()).clamp_min(0)
    pooled_D = (rows_K1 * spread_KD).sum(0) / rows_K1.sum()
    variances_KD = (rows_K1 * spread_KD + POOLED_ROWS * pooled_D) / (rows_K1 + POOLED_ROWS)
    return GaussianMixture(
        rows_K1[:, 0] / rows_K1.sum(), means_KD, variances_KD.clamp_min(VARIANCE_FLOOR), basis=basis
    )
