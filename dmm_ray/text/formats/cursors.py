"""Keeps readers open between reads, so that files without an index are not decoded from the start each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dmm_ray.text.documents import Content
from dmm_ray.text.formats.base import RecordBlock, Source, TextFile, changed, read_blocks

LIMIT = 8
"""Maximum number of idle cursors per process."""


class Cursor:
    """A position in one file that only moves forward."""

    def __init__(self, file: TextFile, number: int, place: int) -> None:
        self.number = number
        """Number of the next document."""
        self._file = file
        self._blocks = read_blocks(file, place)
        self._block = RecordBlock((), lambda _: Content(), 0)
        self._at = 0

    @property
    def key(self) -> tuple[str, str, Source]:
        """Identifies what the cursor reads."""
        return key_of(self._file)

    def read(self, first: int, stop: int) -> Iterator[tuple[int, Content]]:
        """Documents ``first`` (not before ``number``) up to but excluding ``stop``, numbered within the file.

        Raises:
            UserError: the file has changed since the scan.
        """
        while self.number < stop:
            if self._at == len(self._block.raws):
                self._block, self._at = self._next_block(), 0
            skipped = max(min(first - self.number, len(self._block.raws) - self._at), 0)
            self.number, self._at = self.number + skipped, self._at + skipped
            if self._at < len(self._block.raws):
                content = self._block.parse(self._block.raws[self._at])
                self.number, self._at = self.number + 1, self._at + 1
                yield self.number - 1, content

    def _next_block(self) -> RecordBlock:
        block = next(self._blocks, None)
        if block is None:
            raise changed(self._file)
        return block

    @property
    def is_finished(self) -> bool:
        """Whether no documents are left."""
        return self.number >= self._file.documents

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()


def key_of(file: TextFile) -> tuple[str, str, Source]:
    """Identifies a file as it was scanned; cursors with the same key are interchangeable."""
    return file.uri, file.sha256, file.source


class Cursors:
    """The idle cursors of a process, least recently used first. Thread-safe."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.opened = 0
        """How many times a file was opened."""
        self._limit = limit
        self._idle: list[Cursor] = []
        self._lock = threading.Lock()

    def read(self, file: TextFile, first: int, stop: int) -> Iterator[tuple[int, Content]]:
        """Documents ``first`` up to but excluding ``stop`` of a file, numbered within it.

        Raises:
            UserError: the file is missing, damaged, or has changed since the scan.
        """
        with self._taken(file, first) as cursor:
            yield from cursor.read(first, stop)

    @contextmanager
    def _taken(self, file: TextFile, number: int) -> Iterator[Cursor]:
        """A cursor for the caller's exclusive use, kept afterwards unless it failed."""
        cursor = self._take(file, number)
        try:
            yield cursor
        except GeneratorExit:  # the caller stopped early
            self._put_back(cursor, wait=False)
            raise
        except BaseException:
            cursor.close()
            raise
        self._put_back(cursor)

    def _take(self, file: TextFile, number: int) -> Cursor:
        """The closest idle cursor before ``number``, or a new one if that starts at least as close."""
        start, place = file.source.place(file.starts, number)
        key = key_of(file)
        with self._lock:
            near = [c for c in self._idle if c.key == key and start <= c.number <= number]
            if near:
                best = max(near, key=lambda c: c.number)
                self._idle.remove(best)
                return best
            self.opened += 1
        return Cursor(file, start, place)

    def _put_back(self, cursor: Cursor, wait: bool = True) -> None:
        """Keep a cursor, or close it if the lock is held and ``wait`` is false.

        The garbage collector may finalise an abandoned reader while this very thread holds the lock: waiting would
        then deadlock.
        """
        if cursor.is_finished or not self._lock.acquire(blocking=wait):
            cursor.close()
            return
        try:
            idle = [*self._idle, cursor]
            evicted, self._idle = idle[: -self._limit], idle[-self._limit :]
        finally:
            self._lock.release()
        for old in evicted:
            old.close()


CURSORS = Cursors()
"""The cursors of this process."""
