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


def numpy_rng(seed: SupportsIndex) -> np.random.Generator:
    """numpy's generator; for a seed from 0 to 2^64 - 1 the one of ``default_rng(seed)``. Raises as :func:`as_seed`."""
    return np.random.default_rng(as_seed(seed) & MASK64)


def torch_rng(seed: SupportsIndex) -> torch.Generator:
    """torch's generator, on the CPU. Raises as :func:`as_seed`."""
    import torch

    return torch.Generator().manual_seed(as_seed(seed) & MASK64)
