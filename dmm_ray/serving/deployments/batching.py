"""Joining the rows of many requests into one solver call, and cutting large requests into several.

Serve's own ``@serve.batch`` forms batches before the one running has ended, mixes calls that cannot share a
solver run, and sends an item that does not fit to the back of its queue, behind newer ones. Here a batch is
formed when the solver is free, from rows of one call in order of arrival.
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
"""Named arrays with one leading entry a row."""
Columns = dict[str, "np.ndarray | int | None"]
"""Answer by name: arrays with one leading entry a row, and values that hold for every row."""


class _Piece(NamedTuple, Generic[Key]):
    key: Key
    rows: Rows
    size: int
    answer: asyncio.Future[Columns]
    arrived: float


class RowBatcher(Generic[Key]):
    """Runs ``solve`` in a thread, one call at a time, on rows of one key joined up to ``max_rows`` of it.

    All calls are made by one thread, which others may borrow: each thread that computes would have OpenMP threads of
    its own, and where those are more than the cores they hardly spin while they wait, which halves the speed.

    Args:
        solve: (key, rows) -> columns; a row's columns must not depend on the other rows.
        max_rows: key -> most rows of a call, at least 1.
        wait_s: how long to wait for more rows when the first has just arrived. Only after a call that joined several
            requests: a client that asks alone does not wait.
        watch: is told how many rows wait, whenever that changes.
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
        """Rows that wait for the solver."""
        return sum(piece.size for piece in self._waiting if not piece.answer.cancelled())

    @property
    def busy_s(self) -> float:
        """How long the solver call that runs has taken; 0 while none runs."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def aside(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, done by the solver's thread between two calls. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def submit(self, key: Key, rows: Rows) -> Columns:
        """The columns of ``rows`` (arrays of equal, positive length).

        A large request is cut; each piece queues when the one before it is done, so that others get a turn
        in between. If the caller is cancelled, rows not yet started are dropped.

        Raises:
            Exception: whatever ``solve`` raised for these rows alone.
        """
        n = len(next(iter(rows.values())))
        done, at = list[Columns](), 0
        while at < n:
            most = self.max_rows(
                key
            )  # asked anew for each piece: it follows how fast the solver turns out to be
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
            self._watch(self.waiting_rows)  # it waits no more
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
        """Where company is likely, wait until the oldest piece has waited long enough or a full batch is there."""
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
        """Remove the oldest live piece and, in order, those of its key that fit beside it."""
        live = [piece for piece in self._waiting if not piece.answer.cancelled()]
        batch: list[_Piece[Key]] = []
        rest: deque[_Piece[Key]] = deque()
        # A piece may be larger than what is right by now; it then goes alone.
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
            for piece in batch:  # one request's rows must not fail another's
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
