"""Choosing a mixture on validation rows: basis, number of components, rank, variance floor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dmm_ray.gaussians.analysers import fit_analysers
from dmm_ray.gaussians.clusters import Clusters, find_clusters
from dmm_ray.gaussians.diagonal import fit_diagonal
from dmm_ray.gaussians.mixture import GaussianMixture
from dmm_ray.seeds import torch_rng

logger = logging.getLogger(__name__)
ROWS_PER_COMPONENT = 20
"""Minimum average number of training rows per component."""
FLOORS = (1e-4, 1e-3, 1e-2)
"""Variance floors tried."""


class HasVelocity(Protocol):
    """Anything that predicts the velocity at noised rows."""

    def velocity(self, z: Tensor, u: Tensor | float, /) -> Tensor:
        """``E[noise - z | z_u]`` (N, D) at rows z_u (N, D), with u a number or one per row (N,)."""
        ...


@dataclass
class ChosenMixture:
    """The mixture chosen on validation rows, and the results of all candidates."""

    mixture: GaussianMixture
    """Its ``seconds`` include all candidates, so they are the cost of the choice."""
    losses: dict[str, float]
    """Flow-matching loss on validation rows of each candidate."""
    floor: float
    """Smallest variance, chosen by the log density of validation rows, the metric that it affects most."""
    lowered: int | None
    """The largest number of components that the rows allow, if a larger one was requested; else None."""


def choose_diagonal(
    z: Tensor, validation: Tensor, sizes: Sequence[int], seed: int = 0, own_axes: bool = True
) -> ChosenMixture:
    """Choose a mixture of diagonal Gaussians on validation rows.

    Numbers of components are tried in rising order, in the basis derived from k-means, until one is worse than the one
    before; the best number is then also tried in the rows' own axes.

    Args:
        z: (N, D) training rows.
        validation: (M, D) rows of other documents.
        sizes: numbers of components to try; those with too few rows per component are lowered.
        seed: seed of k-means.
        own_axes: also try the best number in the rows' own axes; activations have so far preferred the other basis.
    """
    search = _Search(z, validation, seed)
    sizes = search.affordable(sizes)
    for size in sizes:
        if not search.improves(f"{size}", size, fit_diagonal):
            break
    if own_axes:
        best = search.size
        search.improves(f"{best} in the rows' own axes", best, partial(fit_diagonal, rotated=False))
    return search.chosen()


def choose_analysers(
    z: Tensor, validation: Tensor, sizes: Sequence[int], ranks: Sequence[int], seed: int = 0
) -> ChosenMixture:
    """Choose a mixture of factor analysers on validation rows.

    Numbers of components are tried in rising order with the lowest rank until one is worse than the one before, then
    ranks likewise with the best number. Arguments are as for :func:`choose_diagonal`; ``ranks`` are the numbers of
    factors per component to try.
    """
    search = _Search(z, validation, seed)
    first, *others = sorted({min(rank, z.shape[1] - 1) for rank in ranks})
    sizes = search.affordable(sizes)
    for size in sizes:
        if not search.improves(f"{size} x {first}", size, partial(fit_analysers, rank=first, seed=seed)):
            break
    best = search.size
    for rank in others:
        if not search.improves(f"{best} x {rank}", best, partial(fit_analysers, rank=rank, seed=seed)):
            break
    return search.chosen()


class _Search:
    """Fits candidates and keeps the best so far."""

    def __init__(self, z: Tensor, validation: Tensor, seed: int) -> None:
        self.z, self.validation, self.seed = z, validation, seed
        self.losses: dict[str, float] = {}
        self.best: GaussianMixture | None = None
        self.size, self.seconds = 0, 0.0
        self.lowered: int | None = None
        self._clusters: tuple[int, Clusters] | None = None

    def affordable(self, sizes: Sequence[int]) -> list[int]:
        """``sizes`` in rising order, capped at what the rows allow."""
        most = max(len(self.z) // ROWS_PER_COMPONENT, 1)
        if max(sizes) > most:
            self.lowered = most
            logger.warning(
                "mixtures of more than %d components reduced to that number: %d rows, %d required for each",
                most,
                len(self.z),
                ROWS_PER_COMPONENT,
            )
        return sorted({min(size, most) for size in sizes})

    def improves(self, name: str, size: int, fit: Callable[[Tensor, Clusters], GaussianMixture]) -> bool:
        """Fit a candidate to ``size`` clusters; return whether it beats the best so far."""
        if self._clusters is None or self._clusters[0] != size:
            self._clusters = size, find_clusters(self.z, size, self.seed)
            self.seconds += self._clusters[1].seconds
        model = fit(self.z, self._clusters[1])
        self.seconds += model.seconds
        self.losses[name] = loss = flow_matching_loss(model, self.validation)
        logger.info("mixture of %s: validation loss %.4f (%.1f s)", name, loss, model.seconds)
        better = loss <= min(self.losses.values())
        if better:
            self.best, self.size = model, size
        return better

    def chosen(self) -> ChosenMixture:
        """The best mixture, with the best floor for its variances."""
        assert self.best is not None
        floored = {floor: self.best.floored(floor) for floor in FLOORS}
        floor = max(floored, key=lambda f: float(floored[f].log_prob(self.validation).mean()))
        floored[floor].seconds = self.seconds
        return ChosenMixture(floored[floor], self.losses, floor, self.lowered)


def flow_matching_loss(method: HasVelocity, z: Tensor, levels: int = 50, seed: int = 0) -> float:
    """Flow-matching loss per dimension on rows (N, D), at levels spread evenly over (0, 1) and with fixed noise.

    Args:
        method: any object with a method ``velocity(z_u, u)``.
        z: clean rows.
        levels: number of noise levels, the midpoints of as many intervals; rows cycle through them.
        seed: seed of the noise.
    """
    noise = torch.randn(z.shape, generator=torch_rng(seed)).to(z.device)
    u = (torch.arange(len(z), device=z.device) % levels + 0.5) / levels
    noised = (1 - u[:, None]) * z + u[:, None] * noise
    return float((method.velocity(noised, u) - (noise - z)).square().mean())
