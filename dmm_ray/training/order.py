"""Which row the s-th training sample is: a pure function of (store, split, seed, s)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Rows that are permuted together."""

    epoch: int
    number: int
    groups: tuple[int, ...]
    """Indices of its row groups, in reading order."""
    rows: int
    start: int
    """Index of its first sample in the run."""


class Order:
    """Repeated seeded passes over all rows, reshuffled every epoch.

    Row groups are visited in random order; consecutive groups that together hold ``window_rows`` rows form a window,
    whose rows are permuted. A layer that fits into one window is permuted as a whole, its groups read in storage order.

    Args:
        counts: training rows in each row group.
        window_rows: minimum number of rows in a window (the last of an epoch may hold fewer).
        seed: seed of both shuffles.
    """

    def __init__(self, counts: np.ndarray, window_rows: int, seed: int) -> None:
        assert counts.sum() > 0
        self.counts = counts
        self.epoch_rows = int(counts.sum())
        self.window_rows = window_rows
        self.seed = seed

    def windows(self, epoch: int) -> Iterator[Window]:
        """The windows of one epoch, in order."""
        used = np.flatnonzero(self.counts)
        if self.epoch_rows > self.window_rows:
            used = self._rng(epoch, 0).permutation(used)
        start, number, groups, rows = epoch * self.epoch_rows, 0, [], 0
        for group in used.tolist():
            groups.append(group)
            rows += int(self.counts[group])
            if rows >= self.window_rows:
                yield Window(epoch, number, tuple(groups), rows, start)
                start, number, groups, rows = start + rows, number + 1, [], 0
        if groups:
            yield Window(epoch, number, tuple(groups), rows, start)

    def from_sample(self, sample: int) -> Iterator[Window]:
        """The endless sequence of windows, beginning with the one that holds ``sample``."""
        epoch = sample // self.epoch_rows
        while True:
            for window in self.windows(epoch):
                if window.start + window.rows > sample:
                    yield window
            epoch += 1

    def permutation(self, window: Window) -> np.ndarray:
        """The order of a window's rows: sample ``window.start + i`` is its row ``permutation[i]``."""
        return self._rng(window.epoch, window.number + 1).permutation(window.rows)

    def used(self, window: Window, first: int, size: int, share: slice) -> np.ndarray:
        """A worker's part of a window: the rows that fall into ``share`` of the global batches of ``size``.

        Returns:
            (n,) int64: row indices within the window, in order of use, without samples before ``first``.
        """
        samples = np.arange(max(window.start, first), window.start + window.rows)
        place = samples % size
        mine = samples[(place >= share.start) & (place < share.stop)]
        return self.permutation(window)[mine - window.start]

    def _rng(self, epoch: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**63, epoch, number])
