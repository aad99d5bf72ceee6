"""Raw activations on their way in: checked, named, cut into pieces that fit in memory, normalised."""

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
"""Rows are worked through in pieces whose widest intermediate holds about this many numbers (8 MB, for the caches)."""
CUDA_CHUNKS = 64
"""A GPU gets pieces this many times as large."""
TOO_WIDE = 9.0
"""Rows whose median mean square after normalisation is not within this factor of 1 bring a warning."""
logger = logging.getLogger(__name__)


def chunk_rows(config: PriorConfig, width: int, device: torch.device) -> int:
    """How many rows to work on at once where each takes ``width`` times the network's widest layer."""
    floats = CHUNK_FLOATS * (CUDA_CHUNKS if device.type == "cuda" else 1)
    return max(1, floats // (width * max(config.d_mlp, config.d)))


class RowChunk(NamedTuple):
    """Consecutive rows: which ones, raw and normalised (m, d) float32, and their ids (m, 2), on the prior's device."""

    at: slice
    x: Tensor
    z: Tensor
    ids: Tensor


class PriorRows:
    """Activations of the layer at index ``layer_index``, checked as a whole before any work is done.

    Args:
        x: (n, d) raw, finite; a tensor, an array or lists.
        ids: (n,) or (n, 2) integers; None for 0..n-1.
        config: of the prior.
        normalizer: of the prior; its device is worked on.
        layer_index: of the layer among the prior's.

    Attributes:
        positions: second column of ids that are pairs, (n,), or None.

    Raises:
        UserError: wrong shape, no rows, a row that contains NaN or Inf, ids that do not fit.
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
        """The block number that the rows are said to come from."""
        return self.config.layers[self.layer_index]

    def empty(self, width: int) -> Tensor:
        """Room (n, width) for a result."""
        return torch.empty(len(self), width, device=self.device)

    def pieces(self, width: int) -> Iterator[RowChunk]:
        """All rows in turn, as many at once as memory allows where each takes ``width`` network widths.

        At the end, logs a warning, once for a prior's layer, if they do not fit the normaliser.
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
