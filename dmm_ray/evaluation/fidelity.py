"""The flow-matching loss: every method predicts the velocities of the same noised rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmm_ray.baselines import BaselineDenoiser
from dmm_ray.evaluation.data import EvaluationRows
from dmm_ray.evaluation.statistics import DECILES, Estimate, by_decile, over_levels
from dmm_ray.prior.flow import NOISE_LEVELS, interpolate
from dmm_ray.prior.noise import normal
from dmm_ray.seeds import numpy_rng

NOISED_CHUNK = 16384
STREAM = 16
"""First noise stream used here, distinct from those of the prior's methods; a row's r-th use has stream 16 + r."""


@dataclass(frozen=True)
class NoisedRows:
    """m (row, level, noise) triples; every level occurs equally often."""

    row: Tensor
    """(m,) index of the clean row."""
    use: Tensor
    """(m,) number of earlier uses of the row."""
    level: Tensor
    """(m,) 1..NOISE_LEVELS; u = level / NOISE_LEVELS."""
    seed: int
    """Seed of the noise."""

    @property
    def decile(self) -> np.ndarray:
        """The tenth of [0, 1] that each level is in, (m,)."""
        return (self.level.numpy(force=True) - 1) * DECILES // NOISE_LEVELS

    @classmethod
    def assign(cls, n: int, seed: int) -> NoisedRows:
        """Assign n rows to levels at random, reusing some, so that each level gets n / NOISE_LEVELS rounded up."""
        m = -(-n // NOISE_LEVELS) * NOISE_LEVELS
        level = torch.arange(m) // (m // NOISE_LEVELS) + 1
        place = torch.from_numpy(numpy_rng(seed).permutation(m))
        return cls(place % n, place // n, level, seed)


def squared_errors(
    methods: Mapping[str, BaselineDenoiser], part: EvaluationRows, noised: NoisedRows
) -> dict[str, np.ndarray]:
    """``mean over dimensions of (v(z_u, u) - (noise - z))^2``, (m,) float64 for each method."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    device = part.z.device
    with torch.inference_mode():
        for at in torch.arange(len(noised.row)).split(NOISED_CHUNK):
            row, u = noised.row[at].to(device), noised.level[at].to(device, torch.float32) / NOISE_LEVELS
            z = part.z[row]
            noise = _noise(noised.seed, part.ids[row], noised.use[at].to(device), z.shape[1])
            z_u = interpolate(z, noise, u)
            for name, method in methods.items():
                error = (method.velocity(z_u, u) - (noise - z)).double().square().mean(1)
                found[name].append(error.numpy(force=True))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _noise(seed: int, ids: Tensor, use: Tensor, d: int) -> Tensor:
    noise = torch.empty(len(ids), d, device=ids.device)
    for repeat in use.unique().tolist():
        noise[use == repeat] = normal(seed, ids[use == repeat], d, STREAM + repeat)
    return noise


@dataclass(frozen=True)
class FlowLoss:
    """One method's loss on some rows."""

    overall: Estimate | None
    by_decile: list[float | None]


def summarize(
    draws: Sequence[tuple[NoisedRows, np.ndarray]], docs: np.ndarray, mask: np.ndarray | None = None
) -> FlowLoss:
    """The loss over all levels, and by decile of u.

    Args:
        draws: the triples and their errors (m,) from :func:`squared_errors`, of one or several draws of the noise.
        docs: (n,) document of each clean row.
        mask: (n,) which clean rows to include; None includes all.
    """
    row = np.concatenate([noised.row.numpy(force=True) for noised, _ in draws])
    decile = np.concatenate([noised.decile for noised, _ in draws])
    errors = np.concatenate([found for _, found in draws])
    kept = np.ones(len(row), dtype=bool) if mask is None else mask[row]
    return FlowLoss(
        over_levels(errors[kept], decile[kept], docs[row][kept]), by_decile(errors[kept], decile[kept])
    )
