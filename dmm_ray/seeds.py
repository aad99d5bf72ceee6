"""Seeds and random number generators; any integer is a valid seed, whatever its type and sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from dmm_ray.arguments import as_integer

if TYPE_CHECKING:
    import torch

MASK64 = (1 << 64) - 1


def as_seed(seed: SupportsIndex) -> int:
    """Convert a seed to a plain ``int``. Raises UserError if it is not an integer.

    Example:
        >>> as_seed(np.int32(-3))
        -3
    """
    return as_integer("seed", seed)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood 2014): mixes every bit of each 64-bit integer into all its bits.

    Args:
        x: uint64, any shape.
    """
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def numpy_rng(seed: SupportsIndex, *more: SupportsIndex) -> np.random.Generator:
    """A numpy generator; equal to ``default_rng(seed)`` for a single seed in [0, 2^64). Raises like :func:`as_seed`.

    Args:
        seed: the seed.
        more: further integers that, with the seed, key a separate generator, e.g. for a row.
    """
    seeds = [as_seed(one) & MASK64 for one in (seed, *more)]
    return np.random.default_rng(seeds if more else seeds[0])


def torch_rng(seed: SupportsIndex) -> torch.Generator:
    """A torch generator on the CPU. Raises like :func:`as_seed`."""
    import torch

    return torch.Generator().manual_seed(as_seed(seed) & MASK64)
