"""Bodies of the Open Inference Protocol with binary tensors, as a client writes and reads them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

LENGTH_HEADER = "Inference-Header-Content-Length"
DATATYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64"}
"""The protocol's name of a numpy dtype (bfloat16 is that of ml_dtypes)."""
READ = {"FP32": "<f4", "INT64": "<i8"}
"""How numpy reads what the endpoint answers."""


def pack(inputs: dict[str, np.ndarray], parameters: dict[str, Any]) -> tuple[bytes, int]:
    """A request for binary outputs: its body, and the length of the JSON in front of the tensors.

    Args:
        inputs: tensors by name, of a dtype in ``DATATYPES``, in native (little-endian) order.
        parameters: the operation's arguments; those that are None are left out.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    given = {name: value for name, value in parameters.items() if value is not None}
    message = {
        "inputs": [_described(name, array) for name, array in arrays.items()],
        "parameters": {**given, "binary_data_output": True},
    }
    head = json.dumps(message).encode()
    tensors = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    return b"".join([head, *tensors]), len(head)


def unpack(body: bytes, head_bytes: int) -> dict[str, np.ndarray]:
    """The outputs by name of an answer whose first ``head_bytes`` are JSON; they share its memory.

    Raises:
        ValueError, KeyError, TypeError: it is no such answer.
    """
    found, start = {}, head_bytes
    for output in json.loads(body[:head_bytes])["outputs"]:
        stop = start + output["parameters"]["binary_data_size"]
        flat = np.frombuffer(memoryview(body)[start:stop], READ[output["datatype"]])
        found[output["name"]] = flat.reshape(output["shape"])
        start = stop
    return found


def _described(name: str, array: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": DATATYPES[array.dtype.name],
        "parameters": {"binary_data_size": array.nbytes},
    }
