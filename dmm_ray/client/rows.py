"""Rows of a request, and their division into parts in which each row keeps its id."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmm_ray.client.errors import ClientError


@dataclass(frozen=True)
class RequestRows:
    """Some rows of a request.

    Args:
        start: index of the first one in the whole request.
        ids: their ids, int64 (n,) or (n, 2).
        x: the activations (n, d); None if they are to be drawn.
        levels: one noise level per row, float64 (n,), if they differ.
    """

    start: int
    ids: np.ndarray
    x: np.ndarray | None
    levels: np.ndarray | None = None

    @classmethod
    def given(cls, x: Any, ids: Any, u: Any = None) -> RequestRows:
        """All rows of a request, with one noise level per row if ``u`` is given. Raises ClientError if invalid."""
        array = activations_of(x)
        levels = None if u is None else _levels(u, len(array))
        return cls(0, _ids(ids, len(array)), array, levels)

    @classmethod
    def drawn(cls, n: Any, ids: Any) -> RequestRows:
        """The rows of n samples. Raises ClientError if n or the number of ids is invalid."""
        n = integer("n", n)
        if n < 1:
            raise ClientError(f"n: must be at least 1 (got {n})")
        return cls(0, _ids(ids, n), None)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> RequestRows:
        """Rows ``start`` to ``stop`` of these, without copying."""
        x = None if self.x is None else self.x[start:stop]
        levels = None if self.levels is None else self.levels[start:stop]
        return RequestRows(self.start + start, self.ids[start:stop], x, levels)

    def cut(self, most: int) -> Iterator[RequestRows]:
        """Split into parts of at most ``most`` rows."""
        return (self.part(i, min(i + most, len(self))) for i in range(0, len(self), most))

    def tensors(self) -> dict[str, np.ndarray]:
        """The input tensors of the request for these rows."""
        main = {"n": np.array([len(self)], np.int64)} if self.x is None else {"activations": self.x}
        levels = {} if self.levels is None else {"u": self.levels}
        return {**main, "ids": self.ids, **levels}


def activations_of(x: Any) -> np.ndarray:
    """Rows of activations (n, d) in a dtype that can be sent, from arrays, tensors or lists.

    Raises:
        ClientError: wrong shape, complex or masked numbers, or not numbers at all.
    """
    array = array_of("x", x)
    if (array.dtype.kind == "V" and array.dtype.name != "bfloat16") or array.dtype.kind not in "fiuV":
        raise ClientError(f"x: expected real numbers (got {array.dtype})")
    if array.ndim != 2 or not array.size:
        raise ClientError(f"x: expected rows of activations (n, d) (got shape {array.shape})")
    return array if array.dtype.name in ("float32", "float16", "bfloat16") else array.astype(np.float32)


def array_of(name: str, value: Any) -> np.ndarray:
    """An array, tensor or list as an array. Raises ClientError if it is ragged, masked or not an array."""
    if isinstance(value, np.ma.MaskedArray):
        raise ClientError(f"{name}: masked arrays are unsupported; fill or drop the masked values")
    detach = getattr(value, "detach", None)
    if detach is not None:  # a torch tensor, which numpy can only read on the CPU, and not in bfloat16
        value = detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ClientError(f"{name}: expected an array of numbers ({' '.join(str(e).split())[:200]})") from e


def plain(name: str, value: Any) -> Any:
    """An argument as a JSON value; numpy and torch values become Python's. Raises ClientError if it is invalid."""
    if value is None or isinstance(value, bool | str | int):
        return value
    array = array_of(name, value)
    if array.dtype.kind not in "biuf":
        raise ClientError(f"{name}: expected numbers (got {type(value).__name__} {str(value)[:80]})")
    if not np.isfinite(array).all():
        raise ClientError(f"{name}: contains NaN or Inf (got {str(value)[:80]})")
    return array.tolist()


def integer(name: str, value: Any) -> int:
    """An integer argument as an int. Raises ClientError if it is not an integer."""
    try:
        return operator.index(value)
    except TypeError as e:
        raise ClientError(f"{name}: expected an integer (got {str(value)[:80]})") from e


def _levels(u: Any, n: int) -> np.ndarray:
    levels = array_of("u", u)
    if levels.dtype.kind not in "iuf" or levels.shape != (n,):
        raise ClientError(
            f"u: expected one noise level, or one for each of the {n} rows (got shape {levels.shape})"
        )
    return levels.astype(np.float64)


def _ids(ids: Any, n: int) -> np.ndarray:
    """Row ids as int64; 0 .. n-1 if none are given, so that rows keep their ids when split into parts."""
    array = np.arange(n, dtype=np.int64) if ids is None else array_of("ids", ids)
    if array.dtype.kind not in "iu" or array.shape not in {(n,), (n, 2)}:
        raise ClientError(
            f"ids: expected {n} integers or {n} pairs (got {array.dtype} of shape {array.shape})"
        )
    return array.astype(np.int64)
