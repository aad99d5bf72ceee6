"""Seeds: any integer is one, of whatever type and sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from dmm_ray.arguments import as_integer

if TYPE_CHECKING:
    import torch

MASK64 = (1 << 64) - 1


def as_seed(seed: SupportsIndex) -> int:
    """A seed as a plain integer. Raises UserError for what is not an integer.

    Example:
        >>> as_seed(np.int32(-3))
        -3
    """
    return as_integer("seed", seed)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea and Flood 2014): spreads every bit of 64-bit integers over all of theirs.

    Args:
        x: uint64, any shape.
    """
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def numpy_rng(seed: SupportsIndex, *more: SupportsIndex) -> np.random.Generator:
    """numpy's generator; for one seed from 0 to 2^64 - 1 that of ``default_rng(seed)``. Raises as :func:`as_seed`.

    Args:
        seed: of the generator.
        more: with the seed they name a generator of their own, e.g. that of a row.
    """
    seeds = [as_seed(one) & MASK64 for one in (seed, *more)]
    return np.random.default_rng(seeds if more else seeds[0])


def torch_rng(seed: SupportsIndex) -> torch.Generator:
    """torch's generator, on the CPU. Raises as :func:`as_seed`."""
    import torch

    return torch.Generator().manual_seed(as_seed(seed) & MASK64)
