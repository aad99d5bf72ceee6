"""Ordered parallel map in threads, for many small files on remote storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

THREADS = 16
T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterator[T], ahead: int = 4 * THREADS) -> Iterator[R]:
    """``map`` with ``THREADS`` threads, at most ``ahead`` results ahead of the consumer."""
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(items, ahead)):
            yield from pool.map(function, chunk)
