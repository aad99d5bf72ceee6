"""Rows of a request and their cutting into parts that keep their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmm_ray.client.errors import ClientError
from dmm_ray.client.tensors import DATATYPES


@dataclass(frozen=True)
class Rows:
    """Some rows of a request.

    Args:
        start: number of the first one in the whole request.
        ids: their names, int64 (n,) or (n, 2).
        x: the activations (n, d); None where they are to be drawn.
    """

    start: int
    ids: np.ndarray
    x: np.ndarray | None

    @classmethod
    def given(cls, x: Any, ids: Any) -> Rows:
        """All rows of a request. Raises ClientError for shapes that do not fit."""
        array = np.asarray(x)
        if array.dtype.name not in DATATYPES or array.dtype.kind == "i":
            array = array.astype(np.float32)
        if array.ndim != 2 or not array.size:
            raise ClientError(f"x: rows of activations (n, d) are needed (got shape {array.shape})")
        return cls(0, _ids(ids, len(array)), array)

    @classmethod
    def drawn(cls, n: int, ids: Any) -> Rows:
        """The rows of n samples. Raises ClientError for ids of another length."""
        if n < 1:
            raise ClientError(f"n: at least 1 is needed (got {n})")
        return cls(0, _ids(ids, n), None)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these; no copy."""
        x = None if self.x is None else self.x[start:stop]
        return Rows(self.start + start, self.ids[start:stop], x)

    def cut(self, most: int) -> Iterator[Rows]:
        """Parts of at most ``most`` rows."""
        return (self.part(i, min(i + most, len(self))) for i in range(0, len(self), most))

    def tensors(self) -> dict[str, np.ndarray]:
        """The inputs of the request for these rows."""
        main = {"n": np.array([len(self)], np.int64)} if self.x is None else {"activations": self.x}
        return {**main, "ids": self.ids}


def _ids(ids: Any, n: int) -> np.ndarray:
    """Row names as int64; 0 .. n-1 where none are given, so that parts keep the names of the whole."""
    array = np.arange(n, dtype=np.int64) if ids is None else np.asarray(ids)
    if array.dtype.kind not in "iu" or array.shape not in {(n,), (n, 2)}:
        raise ClientError(
            f"ids: {n} integers or {n} pairs are needed (got {array.dtype} of shape {array.shape})"
        )
    return array.astype(np.int64)
