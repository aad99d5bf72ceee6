"""k-means, per-cluster sums, and the basis in which clusters are closest to diagonal.

Shapes: N rows, D dimensions, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_ray.seeds import torch_rng

CHUNK = 8192
START_ROWS = 65536
"""Rows that k-means runs on, or 32 per cluster if that is more."""
LLOYD_STEPS = 8
Assign = Callable[[Tensor], Tensor]
"""Maps rows (N, D) to the cluster (N,) of each."""


class Sums(NamedTuple):
    """Number of rows, sum of z and sum of z^2 per cluster: (K,), (K, D), (K, D)."""

    rows: Tensor
    first: Tensor
    second: Tensor


class Clusters(NamedTuple):
    """A clustering, and the basis derived from it."""

    centres: Tensor
    """(K, D), of non-empty clusters only."""
    basis: Tensor
    """(D, D), orthonormal columns: eigenvectors of the pooled within-cluster covariance, by rising eigenvalue."""
    seconds: float
    """Time taken to find them."""


def find_clusters(z: Tensor, k: int, seed: int = 0) -> Clusters:
    """k-means on a subsample of the rows (N, D), and the eigenbasis of the within-cluster covariance."""
    start = time.perf_counter()
    order = torch.randperm(len(z), generator=torch_rng(seed)).to(z.device)
    some = z[order[: max(START_ROWS, 32 * k)]]
    centres = kmeans(some, min(k, len(z)), LLOYD_STEPS)
    sums = gather(some, assigned(some, nearest(centres)), len(centres))
    kept = sums.rows > 0
    centres = sums.first[kept] / sums.rows[kept][:, None]
    basis = within_basis(some, centres)
    return Clusters(centres, basis, time.perf_counter() - start)


def kmeans(z: Tensor, k: int, steps: int) -> Tensor:
    """Lloyd's algorithm, starting from the first k rows (shuffle them first); returns centres (K, D).

    The centre of an empty cluster is moved to another row.
    """
    centres = z[:k].clone()
    for step in range(steps):
        sums = gather(z, assigned(z, nearest(centres)), k)
        empty = (sums.rows == 0).nonzero()[:, 0]
        centres = sums.first / sums.rows.clamp_min(1)[:, None]
        centres[empty] = z[(k + step * k + empty) % len(z)]
    return centres


def nearest(centres: Tensor) -> Assign:
    """A function that finds the nearest of the centres (K, D) to each row."""
    half_K = -0.5 * centres.square().sum(1)
    turned_DK = centres.T.contiguous()
    return lambda rows: torch.addmm(half_K, rows, turned_DK).max(1).indices


def gather(z: Tensor, which: Tensor, k: int, basis: Tensor | None = None) -> Sums:
    """Per-cluster sums of rows (N, D) in clusters ``which`` (N,), taken in coordinates of ``basis`` if given."""
    first_KD = torch.zeros(k, z.shape[1], device=z.device)
    second_KD = torch.zeros_like(first_KD)
    for rows, at in zip(z.split(CHUNK), which.split(CHUNK), strict=True):
        turned = rows if basis is None else rows @ basis
        first_KD.index_add_(0, at, turned)
        second_KD.index_add_(0, at, turned.square())
    return Sums(torch.bincount(which, minlength=k).to(z.dtype), first_KD, second_KD)


def assigned(z: Tensor, assign: Assign) -> Tensor:
    """The cluster (N,) of each row (N, D), computed in chunks."""
    return torch.cat([assign(rows) for rows in z.split(CHUNK)])


def within_basis(z: Tensor, centres: Tensor) -> Tensor:
    """Eigenvectors (D, D) of the covariance of the rows (N, D) minus their nearest centres."""
    assign, d = nearest(centres), z.shape[1]
    covariance_DD = torch.zeros(d, d, dtype=torch.float64, device=z.device)
    for chunk in z.split(CHUNK):
        off = chunk - centres[assign(chunk)]
        covariance_DD += (off.T @ off).double()
    return torch.linalg.eigh(covariance_DD / len(z)).eigenvectors.to(z.dtype).contiguous()
