"""Tensors of the Open Inference Protocol (KServe V2), for client and server: datatypes, numbers in JSON, raw bytes.

Requires only numpy. Bytes are little-endian, as is memory on both sides.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

LENGTH_HEADER = "Inference-Header-Content-Length"
"""Header of a request or response with binary tensors: the number of bytes of its body that are JSON."""
RAW = {"FP64": "<f8", "FP32": "<f4", "FP16": "<f2", "BF16": "<u2", "INT64": "<i8", "INT32": "<i4"}
"""The numpy dtype that reads the bytes of each datatype; numpy has no bfloat16."""
DATATYPES = {
    "float64": "FP64", "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32",
}  # fmt: skip
"""The protocol's name for each numpy dtype (bfloat16 is from ml_dtypes)."""
INTEGERS = ("INT64", "INT32")


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name for an array's dtype. Raises KeyError if it has none."""
    return DATATYPES[array.dtype.name]


def from_bytes(raw: bytes | bytearray | memoryview, datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor in ``raw``: FP16 and BF16 become float32, INT32 becomes int64; other datatypes are not copied.

    Raises:
        ValueError: the length of ``raw`` does not match the shape.
    """
    needed = math.prod(shape) * np.dtype(RAW[datatype]).itemsize
    if len(raw) != needed:
        raise ValueError(f"{len(raw)} bytes; shape {list(shape)} of {datatype} has {needed}")
    flat = np.frombuffer(raw, RAW[datatype])
    if datatype == "FP16":
        flat = flat.astype(np.float32)
    if datatype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    if datatype == "INT32":
        flat = flat.astype(np.int64)
    return flat.reshape(shape)


def from_numbers(numbers: list[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of JSON ``numbers``, flat or nested in rows; values out of range become infinite.

    Raises:
        ValueError: the numbers do not match the shape.
    """
    whole = datatype in INTEGERS
    array = np.asarray(numbers, dtype=np.int64 if whole else np.float64)  # raises ValueError for ragged rows
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise ValueError(f"data of shape {list(array.shape)} does not fill shape {list(shape)}")
    with np.errstate(over="ignore"):
        return array.reshape(shape).astype(
            {"FP64": np.float64}.get(datatype, np.int64 if whole else np.float32)
        )


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array as sent by the protocol; a view if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def described(name: str, array: np.ndarray, *, binary: bool) -> dict[str, Any]:
    """A tensor's entry in a message, with its numbers in ``data`` or, if binary, after the JSON."""
    entry = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
    if binary:
        return {**entry, "parameters": {"binary_data_size": array.nbytes}}
    return {**entry, "data": array.reshape(-1).tolist()}


def pack(inputs: dict[str, np.ndarray], parameters: dict[str, Any]) -> tuple[bytes, int]:
    """A request for binary outputs: its body, and the length of the JSON that precedes the tensors.

    Args:
        inputs: tensors by name, of a dtype in ``DATATYPES``.
        parameters: the operation's arguments, as JSON values; those that are None are omitted.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    entries = [described(name, array, binary=True) for name, array in inputs.items()]
    head = json.dumps({"inputs": entries, "parameters": {**given, "binary_data_output": True}}).encode()
    return b"".join([head, *(raw_bytes(array) for array in inputs.values())]), len(head)


def unpack(body: bytes, head_bytes: int) -> dict[str, np.ndarray]:
    """The outputs, by name, of a response whose first ``head_bytes`` are JSON; they share its memory where possible.

    Raises:
        ValueError, KeyError, TypeError: ``body`` is not such a response.
    """
    found, start = {}, head_bytes
    for output in json.loads(body[:head_bytes])["outputs"]:
        stop = start + output["parameters"]["binary_data_size"]
        raw = memoryview(body)[start:stop]
        found[output["name"]] = from_bytes(raw, output["datatype"], tuple(output["shape"]))
        start = stop
    return found
