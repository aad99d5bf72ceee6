"""Input rows: raw activations checked, given ids, cut into pieces that fit in memory, and normalised."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.noise import row_ids
from dmm_ray.prior.normalizer import Normalizer

Ids = Tensor | np.ndarray | None
CHUNK_FLOATS = 1 << 21
"""Rows are processed in pieces whose widest intermediate has about this many elements (8 MB, to fit the caches)."""
CUDA_CHUNKS = 64
"""A GPU gets pieces this many times as large."""
TOO_WIDE = 9.0
"""A warning is logged for rows whose median mean square after normalisation is not within this factor of 1."""
logger = logging.getLogger(__name__)


def chunk_rows(config: PriorConfig, width: int, device: torch.device) -> int:
    """How many rows to process at once if each takes ``width`` times the network's widest layer."""
    floats = CHUNK_FLOATS * (CUDA_CHUNKS if device.type == "cuda" else 1)
    return max(1, floats // (width * max(config.d_mlp, config.d)))


class RowChunk(NamedTuple):
    """Consecutive rows: their slice, raw and normalised (m, d) float32, and ids (m, 2), on the prior's device."""

    at: slice
    x: Tensor
    z: Tensor
    ids: Tensor


class PriorRows:
    """Activations of the layer at index ``layer_index``, all checked before any work is done.

    Args:
        x: (n, d) raw, finite; a tensor, an array or lists.
        ids: (n,) or (n, 2) integers; None for 0..n-1.
        config: the prior's configuration.
        normalizer: the prior's normaliser, whose device is used.
        layer_index: index of the layer among the prior's.

    Attributes:
        positions: second column of ids that are pairs, (n,), or None.

    Raises:
        UserError: wrong shape, no rows, a row with NaN or Inf, or ids that do not match.
    """

    def __init__(
        self, x: Any, ids: Ids, config: PriorConfig, normalizer: Normalizer, layer_index: int
    ) -> None:
        self.config, self.normalizer, self.layer_index = config, normalizer, layer_index
        self.device = normalizer.mean.device
        try:
            self.x = torch.as_tensor(x)
        except (TypeError, ValueError) as e:
            raise UserError(f"activations: expected numbers of shape (n, {config.d}): {e}") from e
        if self.x.ndim != 2 or self.x.shape[1] != config.d:
            raise UserError(f"activations: expected shape (n, {config.d}), got {tuple(self.x.shape)}")
        if len(self.x) == 0:
            raise UserError("activations: at least one row is needed")
        self.ids = row_ids(ids, len(self.x), self.device)
        self.positions = self.ids[:, 1] if ids is not None and torch.as_tensor(ids).ndim == 2 else None
        self._check_finite(named=ids is not None)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def layer(self) -> int:
        """The block number that the rows are declared to come from."""
        return self.config.layers[self.layer_index]

    def empty(self, width: int) -> Tensor:
        """An uninitialised result tensor (n, width)."""
        return torch.empty(len(self), width, device=self.device)

    def pieces(self, width: int) -> Iterator[RowChunk]:
        """Yield all rows in order, as many at once as memory allows if each takes ``width`` network widths.

        At the end, logs a warning, once per layer of a prior, if they do not fit the normaliser.
        """
        size, squares = chunk_rows(self.config, width, self.device), []
        for start in range(0, len(self), size):
            at = slice(start, min(start + size, len(self)))
            x = self.x[at].to(self.device, torch.float32)
            z = self.normalizer.normalize(x, self.layer_index)
            squares.append(z.square().mean(1))
            yield RowChunk(at, x, z, self.ids[at])
        self._warn(float(torch.cat(squares).median()))

    def _check_finite(self, named: bool) -> None:
        size = chunk_rows(self.config, 1, self.x.device)
        for start in range(0, len(self), size):
            finite = self.x[start : start + size].to(torch.float32).isfinite().all(1)
            if not finite.all():
                bad = start + int(finite.logical_not().nonzero()[0])
                name = f" (id {', '.join(map(str, self.ids[bad].tolist()))})" if named else ""
                raise UserError(f"activations: row {bad}{name} contains NaN or Inf; drop or fix it")

    def _warn(self, square: float) -> None:
        if not 1 / TOO_WIDE <= square <= TOO_WIDE and self.layer_index not in self.normalizer.warned:
            self.normalizer.warned.add(self.layer_index)
            logger.warning(
                "activations: the median row has mean square %.3g after normalisation, where rows of layer %d of %s "
                "have about 1; is this another layer or model?",
                square,
                self.layer,
                self.config.subject.get("id", "this prior's subject"),
            )
