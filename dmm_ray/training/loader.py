"""Batches of training rows, read from the store's row groups inside the worker."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dmm_ray.activations.split import TRAIN, Split
from dmm_ray.activations.store import ActivationStore, Rows
from dmm_ray.errors import UserError
from dmm_ray.training.order import Order, Window


def check_finite(store: ActivationStore, layer: int, rows: Rows) -> None:
    """Raises UserError naming the document and position of the first row with a value that is not finite."""
    finite = rows.activation.isfinite().all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise UserError(
            f"{store.uri}: layer {layer} holds a value that is not finite at document {rows.doc[bad]}, "
            f"position {rows.position[bad]}; extract that document again"
        )


class Loader:
    """Shares of global batches in the run's order.

    Args:
        store: where the rows are.
        layer: which layer.
        split: whose train part is used.
        window_rows: rows shuffled together; the window in use is held in memory in the stored dtype.
        seed: of the order.

    Raises:
        UserError: no training rows.
    """

    def __init__(self, store: ActivationStore, layer: int, split: Split, window_rows: int, seed: int) -> None:
        self.store, self.layer, self.split = store, layer, split
        self.groups = store.row_groups(layer)
        counts = np.array(
            [self._is_train(store.documents(layer, g)).sum() for g in self.groups], dtype=np.int64
        )
        if counts.sum() == 0:
            raise UserError(
                f"{store.uri}: no document falls into the train part; extract more text or change --split"
            )
        self.order = Order(counts, window_rows, seed)
        self._loaded: tuple[tuple[int, ...], Tensor] | None = None

    def batches(self, first: int, size: int, share: slice) -> Iterator[Tensor]:
        """Rows ``share`` of every global batch of ``size`` from batch number ``first`` on, without end, (n, d)."""
        return self._samples(first * size + share.start, share.stop - share.start, size)

    def _samples(self, sample: int, n: int, stride: int) -> Iterator[Tensor]:
        """``n`` rows from sample index ``sample``, then from ``sample + stride``, and so on."""
        windows = self.order.from_sample(sample)
        window = next(windows)
        rows, permutation = self._load(window), self.order.permutation(window)
        while True:
            parts, at = [], sample
            while at < sample + n:
                while at >= window.start + window.rows:
                    window = next(windows)
                    rows, permutation = self._load(window), self.order.permutation(window)
                stop = min(sample + n, window.start + window.rows)
                parts.append(rows[torch.from_numpy(permutation[at - window.start : stop - window.start])])
                at = stop
            yield parts[0] if len(parts) == 1 else torch.cat(parts)
            sample += stride

    def _load(self, window: Window) -> Tensor:
        """A window's training rows (rows, d), in storage order of its groups."""
        if self._loaded is None or self._loaded[0] != window.groups:
            self._loaded = None
            parts = []
            for index in window.groups:
                rows = self.store.read(self.layer, self.groups[index])
                check_finite(self.store, self.layer, rows)
                parts.append(rows.activation[torch.from_numpy(self._is_train(rows.doc))])
            self._loaded = (window.groups, torch.cat(parts))
        return self._loaded[1]

    def _is_train(self, doc: np.ndarray) -> np.ndarray:
        return self.split.of(doc) == TRAIN
