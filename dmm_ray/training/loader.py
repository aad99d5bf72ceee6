"""Batches of training rows, read from the store's row groups inside the worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.store.match import check_finite
from dmm_ray.store.reader import ActivationStore, RowGroup, empty_rows, records
from dmm_ray.store.split import TRAIN, Split
from dmm_ray.training.order import Order, Window

READERS = 2
"""Threads that read a window's row groups."""
COUNTERS = 4
"""Threads that count training rows at the start."""


def store_normalizer(store: ActivationStore, prior_config: PriorConfig) -> Normalizer:
    """The normaliser of a prior of one layer, from the moments of a store's rows."""
    (layer,) = prior_config.layers
    moments = store.statistics(layer)
    mean, var = torch.from_numpy(moments.mean)[None], torch.from_numpy(moments.var)[None]
    return Normalizer(mean, var, prior_config.variance_floor)


class Loader:
    """A worker's share of every global batch, in the run's order.

    A window's rows are written to their final position as they are read, so that a batch is a slice of the window.
    Threads load the next window while the current one is in use; of both, a worker holds only the rows of its share.

    Args:
        store: where the rows are.
        layer: which layer.
        split: its train part is used.
        window_rows: rows shuffled together; a worker holds its share of two windows, up to an eighth more, in the
            stored dtype.
        seed: seed of the order.
        pin: put windows into page-locked memory, so that copies to a GPU overlap with computation; requires CUDA.

    Attributes:
        order: which row each sample is.
        waited: seconds spent waiting for a window so far.

    Raises:
        UserError: no training rows.
    """

    def __init__(
        self,
        store: ActivationStore,
        layer: int,
        split: Split,
        window_rows: int,
        seed: int,
        pin: bool = False,
    ) -> None:
        self.store, self.layer, self.split, self.pin = store, layer, split, pin
        self.groups = store.row_groups(layer)
        counts = self._counts()
        if counts.sum() == 0:
            raise UserError(
                f"{store.uri}: no document falls into the train part; extract more text or change --split"
            )
        self.order = Order(counts, window_rows, seed)
        self.waited = 0.0

    def batches(self, first: int, size: int, share: slice) -> Generator[Tensor]:
        """Yield rows ``share`` (n, d) of every global batch of ``size`` from batch ``first`` on, endlessly.

        A batch may be a view of its window, whose memory later windows reuse: use or copy it before taking the next.
        (Page-locked windows live as long as their batches; CUDA's allocator reuses their memory.) Closing the generator
        stops its threads.

        Raises:
            UserError: a row contains NaN or Inf; the message names its document and position.
        """
        n = share.stop - share.start
        assert n > 0

        buffers = _BufferPool(self._empty)

        def load(window: Window, readers: Executor) -> LoadedWindow:
            return self._load(window, self.order.used(window, first * size, size, share), buffers, readers)

        with closing(_Prefetcher(load, self.order.from_sample(first * size))) as prefetcher:
            loaded, at = self._wait(prefetcher), 0
            while True:
                batch = loaded.rows[at : at + n]
                at += n
                while len(batch) < n:
                    batch = batch.clone()  # the window's memory is about to be reused
                    if not self.pin:
                        buffers.give_back(loaded.memory)
                    del loaded  # free it before the window after next begins to load
                    loaded, at = self._wait(prefetcher), n - len(batch)
                    batch = torch.cat([batch, loaded.rows[:at]])
                yield batch

    def _wait(self, prefetcher: _Prefetcher) -> LoadedWindow:
        started = time.perf_counter()
        loaded = prefetcher.take()
        self.waited += time.perf_counter() - started
        return loaded

    def _load(
        self, window: Window, used: np.ndarray, buffers: _BufferPool, readers: Executor
    ) -> LoadedWindow:
        """Load rows ``used`` (n,) of a window, in that order."""
        n = len(used)
        memory = buffers.take(n + 1)  # row n is a dummy for the rows that other workers use
        slots = np.full(window.rows, n, dtype=np.int64)
        slots[used] = np.arange(n)
        ends = np.cumsum(self.order.counts[list(window.groups)])
        list(readers.map(partial(self._place, memory[: n + 1]), window.groups, np.split(slots, ends[:-1])))
        return LoadedWindow(memory[:n], memory)

    def _place(self, out: Tensor, index: int, slots: np.ndarray) -> None:
        """Read a row group; its i-th training row becomes ``out[slots[i]]``, all others ``out[-1]``."""
        rows = self.store.read(self.layer, self.groups[index], ("activation", "doc", "position"))
        check_finite(self.store, self.layer, rows)
        slot = np.full(len(rows.doc), len(out) - 1, dtype=np.int64)
        slot[self._is_train(rows.doc)] = slots
        records(out)[slot] = records(rows.activation)

    def _empty(self, n: int) -> Tensor:
        """Uninitialised memory for rows (n, d)."""
        d, dtype = self.store.d, self.store.manifest.torch_dtype
        if self.pin:
            return torch.empty(n, d, dtype=dtype, pin_memory=True)
        return empty_rows(n, d, dtype)

    def _counts(self) -> np.ndarray:
        """Training rows in each row group, (groups,) int64."""
        parts = [self.groups[i::COUNTERS] for i in range(COUNTERS)]
        counts = np.empty(len(self.groups), dtype=np.int64)
        with ThreadPoolExecutor(COUNTERS) as counters:
            for i, found in enumerate(counters.map(self._count, parts)):
                counts[i::COUNTERS] = found
        return counts

    def _count(self, groups: Sequence[RowGroup]) -> list[int]:
        return [int(self._is_train(self.store.documents(self.layer, g)).sum()) for g in groups]

    def _is_train(self, doc: np.ndarray) -> np.ndarray:
        return self.split.of(doc) == TRAIN


class LoadedWindow(NamedTuple):
    """A window's rows (n, d), and the buffer that they lie at the beginning of."""

    rows: Tensor
    memory: Tensor


class _BufferPool:
    """Memory for windows: that of a finished one is reused if it is large enough.

    Page faults on fresh memory can take longer than everything else.

    Args:
        make: allocates memory for n rows.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._spare: list[Tensor] = []
        self._grow = False

    def take(self, n: int) -> Tensor:
        """Memory for ``n`` rows or more."""
        spare = self._spare.pop() if self._spare else None
        if spare is not None and len(spare) >= n:
            return spare
        self._grow |= spare is not None
        del spare
        return self._make(n + n // 8 if self._grow else n)  # windows differ slightly in size

    def give_back(self, memory: Tensor) -> None:
        """Return ``memory`` to the pool; nothing may read it any more."""
        self._spare.append(memory)


class _Prefetcher:
    """Loads windows in order, the next one in a thread while the current one is in use.

    Args:
        load: loads a window's rows using the given reader threads.
        windows: the windows to load, endless.
    """

    def __init__(self, load: Callable[[Window, Executor], LoadedWindow], windows: Iterator[Window]) -> None:
        self._load, self._windows = load, windows
        self._thread, self._readers = ThreadPoolExecutor(1), ThreadPoolExecutor(READERS)
        self._loading = self._start()

    def take(self) -> LoadedWindow:
        """Wait for the next window's rows and start loading the one after. Raises any error of the load."""
        rows = self._loading.result()
        self._loading = self._start()
        return rows

    def close(self) -> None:
        """Stop the threads, each after its current row group."""
        self._readers.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)

    def _start(self) -> Future[LoadedWindow]:
        return self._thread.submit(self._load, next(self._windows), self._readers)
