"""Batching the rows of many requests into one solver call, and splitting large requests into several.

Serve's own ``@serve.batch`` forms the next batch before the running one has finished, mixes calls that cannot share a
solver run, and moves an item that does not fit to the back of its queue, behind newer ones. Here, a batch is formed
when the solver becomes free, from rows of equal calls in order of arrival.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Rows = dict[str, np.ndarray]
"""Arrays by name, each with one entry per row along its first dimension."""
Columns = dict[str, "np.ndarray | int | None"]
"""Results by name: arrays with one entry per row along the first dimension, and values that hold for every row."""


class _Piece(NamedTuple, Generic[Key]):
    key: Key
    rows: Rows
    size: int
    answer: asyncio.Future[Columns]
    arrived: float


class RowBatcher(Generic[Key]):
    """Runs ``solve`` in a thread, one call at a time, on batches of up to ``max_rows(key)`` rows with the same key.

    A single thread makes all calls, and other work may borrow it: every computing thread gets its own pool of OpenMP
    threads, and when those outnumber the cores they hardly spin while waiting, which halves the speed.

    Args:
        solve: (key, rows) -> columns; a row's columns must not depend on the other rows.
        max_rows: key -> maximum rows per call, at least 1.
        wait_s: how long to wait for more rows after the first have arrived. Applies only after a call that batched
            several requests, so a lone client does not wait.
        watch: called with the number of waiting rows whenever it changes.
    """

    def __init__(
        self,
        solve: Callable[[Key, Rows], Columns],
        max_rows: Callable[[Key], int],
        wait_s: float,
        watch: Callable[[int], None],
    ) -> None:
        self._watch = watch
        self.max_rows = max_rows
        self._solve = solve
        self._wait_s = wait_s
        self._company = False
        self._thread = ThreadPoolExecutor(1, "dmm-solver")
        self._waiting: deque[_Piece[Key]] = deque()
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._began: float | None = None

    @property
    def waiting_rows(self) -> int:
        """Number of rows waiting for the solver."""
        return sum(piece.size for piece in self._waiting if not piece.answer.cancelled())

    @property
    def busy_s(self) -> float:
        """How long the current solver call has been running, in seconds; 0 if there is none."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the solver's thread, between two calls. Returns and raises whatever ``work`` does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def submit(self, key: Key, rows: Rows) -> Columns:
        """The columns of ``rows`` (arrays of equal, positive length).

        A large request is split; each piece is queued only when the previous one is done, so that other requests get a
        turn in between. If the caller is cancelled, rows not yet started are dropped.

        Raises:
            Exception: whatever ``solve`` raised for these rows alone.
        """
        n = len(next(iter(rows.values())))
        done, at = list[Columns](), 0
        while at < n:
            most = self.max_rows(
                key
            )  # called again for each piece, since the limit follows the measured speed of the solver
            done.append(
                await self._enqueue(key, {name: array[at : at + most] for name, array in rows.items()})
            )
            at += most
        return (
            done[0] if len(done) == 1 else {name: _joined([part[name] for part in done]) for name in done[0]}
        )

    async def _enqueue(self, key: Key, rows: Rows) -> Columns:
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        size = len(next(iter(rows.values())))
        piece = _Piece(key, rows, size, loop.create_future(), time.monotonic())
        self._waiting.append(piece)
        self._watch(self.waiting_rows)
        self._arrival.set()
        try:
            return await piece.answer
        except asyncio.CancelledError:
            self._watch(self.waiting_rows)  # these rows no longer wait
            raise

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            await self._fill()
            if batch := self._take():
                self._watch(self.waiting_rows)
                self._company = len(batch) > 1
                await self._run(batch)

    async def _fill(self) -> None:
        """If concurrent requests are likely, wait until the oldest piece has waited long enough or a batch is full."""
        first = self._waiting[0] if self._waiting and self._company else None
        while first and sum(p.size for p in self._waiting if p.key == first.key) < self.max_rows(first.key):
            left = first.arrived + self._wait_s - time.monotonic()
            if left <= 0:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Piece[Key]]:
        """Dequeue the oldest live piece and, in order, those with the same key that fit into its batch."""
        live = [piece for piece in self._waiting if not piece.answer.cancelled()]
        batch: list[_Piece[Key]] = []
        rest: deque[_Piece[Key]] = deque()
        # The limit may have dropped below the size of a queued piece; that piece then runs alone.
        room = max(live[0].size, self.max_rows(live[0].key)) if live else 0
        for piece in live:
            if (not batch or piece.key == batch[0].key) and piece.size <= room:
                batch.append(piece)
                room -= piece.size
            else:
                if batch and piece.key == batch[0].key:
                    room = 0  # a later, smaller piece must not overtake this one
                rest.append(piece)
        self._waiting = rest
        if rest:
            self._arrival.set()
        else:
            self._arrival.clear()
        return batch

    async def _run(self, batch: list[_Piece[Key]]) -> None:
        rows = {name: np.concatenate([piece.rows[name] for piece in batch]) for name in batch[0].rows}
        self._began = time.monotonic()
        (outcome,) = await asyncio.gather(
            self.aside(partial(self._solve, batch[0].key, rows)), return_exceptions=True
        )
        self._began = None
        if isinstance(outcome, BaseException) and len(batch) > 1:
            for piece in batch:  # retry separately: one request's rows must not fail another's
                await self._run([piece])
            return
        start = 0
        for piece in batch:
            stop = start + piece.size
            if piece.answer.done():
                pass
            elif isinstance(outcome, BaseException):
                piece.answer.set_exception(outcome)
            else:
                piece.answer.set_result({name: _slice(value, start, stop) for name, value in outcome.items()})
            start = stop


def _slice(value: np.ndarray | int | None, start: int, stop: int) -> np.ndarray | int | None:
    return value[start:stop] if isinstance(value, np.ndarray) else value


def _joined(parts: list[np.ndarray | int | None]) -> np.ndarray | int | None:
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return np.concatenate(arrays) if arrays else parts[0]
