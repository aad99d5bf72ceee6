"""Counter-based random numbers: a row's noise is a pure function of (seed, stream, row id).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in 64-bit integer tensor
operations so that the bits are the same on every device, in any batch, in any order and for any number of workers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.seeds import MASK64, as_seed, splitmix64

STREAM_PATH, STREAM_SAMPLE, STREAM_ENCODE, STREAM_PAIRS = range(4)
"""Independent noise streams of a row, by purpose: see ``stream`` in :func:`normal`."""
DRAW = 1 << 8
"""Draw k of a stream is stream + k * DRAW."""
ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def _mix(x: int) -> int:
    return int(splitmix64(np.array(x, dtype=np.uint64)))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 tensors that hold 32-bit words; returns four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap around in int64, but their 64 bits are right; the mask undoes the shift's sign extension.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def row_ids(ids: Tensor | np.ndarray | None, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Row identities as int64 (n, 2).

    Args:
        ids: (n,) identities, (n, 2) pairs such as (document, position), or None for 0..n-1.
        n: number of rows.
        device: where to put them.

    Raises:
        UserError: ids of the wrong length, shape or type.
    """
    ids_t = torch.arange(n) if ids is None else torch.as_tensor(ids)
    if ids_t.dtype.is_floating_point or ids_t.shape not in {(n,), (n, 2)}:
        raise UserError(
            f"ids: expected {n} integers or {n} pairs, got {ids_t.dtype} of shape {tuple(ids_t.shape)}"
        )
    ids_t = ids_t.to(device=device, dtype=torch.int64)
    return ids_t if ids_t.ndim == 2 else torch.stack([ids_t, torch.zeros_like(ids_t)], dim=1)


def random_words(seed: int, ids_N2: Tensor, blocks: int, stream: int = 0) -> Tensor:
    """Random 32-bit words as int64 (n, 4 * blocks), keyed by (seed, stream), counted by (id, word)."""
    key = _mix(_mix(as_seed(seed) & MASK64) ^ (stream & MASK64))
    first, second = ids_N2[:, :1], ids_N2[:, 1:]
    block = torch.arange(blocks, device=ids_N2.device)[None]
    words = philox((block, second & MASK, first & MASK, (first >> 32) & MASK), (key & MASK, key >> 32))
    return torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)


def normal(seed: int, ids: Tensor, d: int, stream: int = 0) -> Tensor:
    """Standard normal noise (n, d) in float32 by the Box-Muller transform.

    Args:
        seed: any integer.
        ids: (n,) or (n, 2) int64 row identities; the noise is generated on their device.
        d: width.
        stream: distinguishes independent draws for the same rows.
    """
    ids_N2 = row_ids(ids, len(ids), ids.device)
    words = random_words(seed, ids_N2, -(-d // 4), stream).to(torch.float32).add_(0.5).mul_(2.0**-32)
    half = words.shape[1] // 2
    radius = words[:, :half].log_().mul_(-2.0).sqrt_()
    angle = words[:, half:].mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :d]


def rademacher(seed: int, ids: Tensor, d: int, stream: int = 0) -> Tensor:
    """Independent signs +1 or -1, (n, d) in float32; arguments as in :func:`normal`."""
    ids_N2 = row_ids(ids, len(ids), ids.device)
    words = random_words(seed, ids_N2, -(-d // 128), stream)
    bits = (words[:, :, None] >> torch.arange(32, device=words.device)) & 1
    return bits.flatten(1)[:, :d].to(torch.float32).mul_(2.0).sub_(1.0)
