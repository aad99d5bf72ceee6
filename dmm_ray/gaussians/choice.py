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
"""Training rows that there must be for each component on average."""
FLOORS = (1e-4, 1e-3, 1e-2)
"""Variance floors tried."""


class HasVelocity(Protocol):
    """Anything that restores noised rows."""

    def velocity(self, z: Tensor, u: Tensor | float, /) -> Tensor:
        """``E[noise - z | z_u]`` (N, D) at rows z_u (N, D), u a number or one per row (N,)."""
        ...


@dataclass
class ChosenMixture:
    """The mixture that validation rows chose, and what it was chosen from."""

    mixture: GaussianMixture
    """Its ``seconds`` are those of everything that was tried: they are what the choice cost."""
    losses: dict[str, float]
    """Flow-matching loss on validation rows of each one tried."""
    floor: float
    """Smallest variance, by the log density of validation rows, which it changes most."""
    lowered: int | None
    """The greatest number of components that the rows allow, where a greater one was asked for."""


def choose_diagonal(
    z: Tensor, validation: Tensor, sizes: Sequence[int], seed: int = 0, own_axes: bool = True
) -> ChosenMixture:
    """The best mixture of diagonal Gaussians.

    Rising numbers of components, in the basis that k-means suggests, until one is worse than the one before; the best
    number in the rows' own axes too.

    Args:
        z: (N, D) training rows.
        validation: (M, D) rows of other documents.
        sizes: numbers of components; those for which there are too few rows are lowered.
        seed: of k-means.
        own_axes: try the best number in the rows' own axes too; activations have always preferred the other basis.
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
    """The best mixture of factor analysers.

    Rising numbers of components with the lowest rank, until one is worse than the one before; then the best number
    with rising ranks, likewise. Arguments as of :func:`choose_diagonal`, and ``ranks``, factors of each component.
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
    """Fits, and keeps the best so far."""

    def __init__(self, z: Tensor, validation: Tensor, seed: int) -> None:
        self.z, self.validation, self.seed = z, validation, seed
        self.losses: dict[str, float] = {}
        self.best: GaussianMixture | None = None
        self.size, self.seconds = 0, 0.0
        self.lowered: int | None = None
        self._clusters: tuple[int, Clusters] | None = None

    def affordable(self, sizes: Sequence[int]) -> list[int]:
        """``sizes`` in rising order, none above what the rows allow."""
        most = max(len(self.z) // ROWS_PER_COMPONENT, 1)
        if max(sizes) > most:
            self.lowered = most
            logger.warning(
                "mixtures of more than %d components lowered to that: %d rows, %d a component",
                most,
                len(self.z),
                ROWS_PER_COMPONENT,
            )
        return sorted({min(size, most) for size in sizes})

    def improves(self, name: str, size: int, fit: Callable[[Tensor, Clusters], GaussianMixture]) -> bool:
        """Whether ``fit`` with ``size`` clusters beats the best mixture so far."""
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
        """The best, with the best floor under its variances."""
        assert self.best is not None
        floored = {floor: self.best.floored(floor) for floor in FLOORS}
        floor = max(floored, key=lambda f: float(floored[f].log_prob(self.validation).mean()))
        floored[floor].seconds = self.seconds
        return ChosenMixture(floored[floor], self.losses, floor, self.lowered)


def flow_matching_loss(method: HasVelocity, z: Tensor, levels: int = 50, seed: int = 0) -> float:
    """Flow-matching loss per dimension on rows (N, D) spread evenly over mid-points of [0, 1], with fixed noise.

    Args:
        method: anything with a ``velocity(z_u, u)``.
        z: clean rows.
        levels: number of noise levels.
        seed: of the noise.
    """
    noise = torch.randn(z.shape, generator=torch_rng(seed)).to(z.device)
    u = (torch.arange(len(z), device=z.device) % levels + 0.5) / levels
    noised = (1 - u[:, None]) * z + u[:, None] * noise
    return float((method.velocity(noised, u) - (noise - z)).square().mean())
