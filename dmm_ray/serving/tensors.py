"""Tensors of the Open Inference Protocol: datatypes, JSON numbers, raw little-endian bytes. Needs numpy alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ITEM_BYTES = {"FP32": 4, "FP16": 2, "BF16": 2, "INT64": 8}
RAW = {"FP32": "<f4", "FP16": "<f2", "BF16": "<u2", "INT64": "<i8"}
"""How numpy reads the bytes of each datatype; it has no bfloat16."""


def from_bytes(raw: bytes | bytearray | memoryview, datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor in ``raw``: float32 for the floating datatypes, int64 for INT64; FP32 and INT64 are not copied.

    Raises:
        ValueError: ``raw`` has not the number of bytes that the shape needs.
    """
    needed = math.prod(shape) * ITEM_BYTES[datatype]
    if len(raw) != needed:
        raise ValueError(f"{len(raw)} bytes; shape {list(shape)} of {datatype} has {needed}")
    flat = np.frombuffer(raw, RAW[datatype])
    if datatype == "FP16":
        flat = flat.astype(np.float32)
    if datatype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(shape)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a float32 or int64 array as the protocol sends them; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).data.cast("B")


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name of an answer's dtype."""
    return "INT64" if array.dtype == np.int64 else "FP32"


def from_numbers(numbers: list[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of JSON ``numbers``, flat or nested in rows; too large ones become infinite.

    Raises:
        ValueError: they do not fill the shape.
    """
    dtype = np.int64 if datatype == "INT64" else np.float64
    array = np.asarray(numbers, dtype=dtype)  # ragged rows raise ValueError by themselves
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise ValueError(f"data of shape {list(array.shape)} does not fill shape {list(shape)}")
    with np.errstate(over="ignore"):
        return array.reshape(shape).astype(np.int64 if datatype == "INT64" else np.float32)
