"""The Open Inference Protocol (KServe V2, REST) with its binary tensor extension: reading requests, writing answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from dmm_ray.operations import OPERATIONS, OperationName
from dmm_ray.protocol import INTEGERS, LENGTH_HEADER, RAW, described, from_bytes, from_numbers, raw_bytes
from dmm_ray.serving.config import MOST_ROWS
from dmm_ray.serving.deployments.batching import Columns
from dmm_ray.serving.errors import RequestError, body_error
from dmm_ray.serving.http.bodies import parse
from dmm_ray.serving.schemas import PARAMETERS, AnyParameters, Finite, Int64, StrictBody

INPUT_TYPES = {
    "activations": ("FP32", "FP16", "BF16"),
    "n": INTEGERS,
    "ids": INTEGERS,
    "u": ("FP64", "FP32", "FP16", "BF16"),
}
RANKS = {"activations": (2,), "n": (1,), "ids": (1, 2), "u": (1,)}
INPUTS: dict[OperationName, tuple[str, ...]] = {
    "log_prob": ("activations", "ids"),
    "velocity_error": ("activations", "ids"),
    "denoise": ("activations", "ids", "u"),
    "sample": ("n", "ids"),
    "encode": ("activations", "ids"),
}
"""The required input of each operation, followed by its optional ones."""
Dimension = Annotated[int, Field(ge=0, lt=2**31)]
Floats = Annotated[list[Finite], Field(fail_fast=True)]
Integers = Annotated[list[Int64], Field(fail_fast=True)]
NUMBERS: dict[tuple[bool, bool], TypeAdapter[Any]] = {
    (False, False): TypeAdapter(Floats),
    (False, True): TypeAdapter(Annotated[list[Floats], Field(fail_fast=True)]),
    (True, False): TypeAdapter(Integers),
    (True, True): TypeAdapter(Annotated[list[Integers], Field(fail_fast=True)]),
}
"""Validators of `data`, by whether it holds integers and whether it is nested."""


class InputParameters(StrictBody):
    """How an input is sent."""

    binary_data_size: int | None = Field(
        default=None, ge=0, description="Bytes of this tensor after the JSON; null: it is in `data`."
    )


class Input(StrictBody):
    """One tensor of a request."""

    name: str = Field(max_length=64)
    shape: list[Dimension] = Field(min_length=1, max_length=2)
    datatype: str = Field(
        max_length=16,
        description="FP32 (in binary also FP16, BF16); INT64 or INT32 for `n` and `ids`; also FP64 for `u`.",
    )
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(default=None, description="Numbers, flat or nested, in row-major order.")


class OutputParameters(StrictBody):
    """How an output is to be sent."""

    binary_data: bool | None = None


class Output(StrictBody):
    """One tensor requested in the answer."""

    name: str = Field(max_length=64)
    parameters: OutputParameters | None = None


class InferBody(StrictBody):
    """A request in the Open Inference Protocol.

    `parameters` takes the fields of the JSON routes other than rows and ids (layer, seed, steps, probes, u, mode,
    block, ...), and `binary_data_output`. `priority` and `timeout`, which other servers support, are accepted and
    ignored.
    """

    id: str | None = Field(default=None, max_length=256, description="Returned in the answer.")
    parameters: dict[str, Any] | None = None
    inputs: list[Input] = Field(min_length=1, max_length=3)
    outputs: list[Output] | None = Field(default=None, max_length=16, description="null: all outputs.")


class Inference(NamedTuple):
    """A parsed request."""

    id: str | None
    arguments: AnyParameters
    n: int
    activations: np.ndarray | None
    ids: np.ndarray | None
    levels: np.ndarray | None
    """One noise level per row, if they differ."""
    outputs: tuple[Output, ...] | None
    binary: bool


def read_inference(operation: OperationName, body: bytearray, header_bytes: str | None) -> Inference:
    """The request in ``body``, whose first ``header_bytes`` (None: all) are JSON and the rest tensors.

    Raises:
        RequestError: 400 if lengths disagree or the JSON is malformed; 413 or 422 for an invalid field.
    """
    end = _header_length(header_bytes, len(body))
    message = parse(InferBody, body if end == len(body) else body[:end])
    tensors = dict(_tensors(message.inputs, memoryview(body)[end:]))
    main, *others = INPUTS[operation]
    if unknown := [name for name in tensors if name not in (main, *others)]:
        raise RequestError(
            422,
            f"inputs.{unknown[0]}: no such input; give {main}, and optionally {' or '.join(others)}",
        )
    if main not in tensors:
        raise RequestError(422, f"inputs: {main} is missing")
    parameters = {k: v for k, v in (message.parameters or {}).items() if k not in ("priority", "timeout")}
    binary = parameters.pop("binary_data_output", False)
    if not isinstance(binary, bool):
        raise RequestError(422, "parameters.binary_data_output: must be true or false")
    arguments = _arguments(operation, parameters)
    n, activations = _rows(tensors[main], operation)
    outputs = None if message.outputs is None else tuple(message.outputs)
    return Inference(
        message.id, arguments, n, activations, tensors.get("ids"), tensors.get("u"), outputs, binary
    )


def write_answer(model: str, asked: Inference, columns: Columns) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON if binary tensors follow, else None.

    Raises:
        RequestError: 422 for an output that this answer does not have.
    """
    arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in columns.items() if value is not None}
    wanted = list(_wanted(asked, arrays))
    tails = [raw_bytes(arrays[name]) for name, binary in wanted if binary]
    header: dict[str, Any] = {} if asked.id is None else {"id": asked.id}
    header |= {
        "model_name": model,
        "model_version": "1",
        "outputs": [described(name, arrays[name], binary=binary) for name, binary in wanted],
    }
    json = to_json(header, inf_nan_mode="null")
    return (b"".join([json, *tails]), len(json)) if tails else (json, None)


def metadata(model: str, operation: OperationName, d: int) -> dict[str, Any]:
    """The answer to ``GET /v2/models/{m}``: the required input and all outputs that may be returned."""
    given = {"name": "n", "datatype": "INT64", "shape": [1]}
    rows = {"name": "activations", "datatype": "FP32", "shape": [-1, d]}
    outputs = []
    for name, result in OPERATIONS[operation].RESULTS.items():
        shape = [-1] if result.per_row == "one" else [-1, d if result.per_row == "d" else -1]
        outputs.append({"name": name, "datatype": "INT64" if result.integer else "FP32", "shape": shape})
    if operation == "log_prob":
        outputs.append({"name": "evaluations", "datatype": "INT64", "shape": [1]})
    inputs = [given if operation == "sample" else rows]
    return {"name": model, "versions": ["1"], "platform": "dmm-ray", "inputs": inputs, "outputs": outputs}


def _header_length(header_bytes: str | None, total: int) -> int:
    if header_bytes is None:
        return total
    if not (header_bytes.isascii() and header_bytes.isdigit() and len(header_bytes) < 12):
        raise RequestError(400, f"{LENGTH_HEADER}: must be the number of bytes of the JSON")
    if int(header_bytes) > total:
        raise RequestError(400, f"{LENGTH_HEADER}: {header_bytes}, but the body has {total} bytes")
    return int(header_bytes)


def _tensors(inputs: list[Input], rest: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    if len({given.name for given in inputs}) < len(inputs):
        raise RequestError(422, "inputs: names must be unique")
    used = 0
    for given in inputs:
        size = None if given.parameters is None else given.parameters.binary_data_size
        _check_type(given, size is not None)
        if size is None:
            yield given.name, _json_tensor(given)
        else:
            yield given.name, _binary_tensor(given, rest[used : used + size])
            used += size
    if used != len(rest):
        raise RequestError(
            400, f"body: {len(rest)} bytes after the JSON, but binary_data_size adds up to {used}"
        )


def _check_type(given: Input, binary: bool) -> None:
    known = INPUT_TYPES.get(given.name, tuple(RAW))
    allowed = known if binary else tuple(name for name in known if name not in ("FP16", "BF16"))
    if given.datatype not in allowed:
        how = "in binary" if binary else "in JSON"
        raise RequestError(422, f"inputs.{given.name}.datatype: must be {' or '.join(allowed)} {how}")
    if binary == (given.data is not None):
        raise RequestError(422, f"inputs.{given.name}: give either data or parameters.binary_data_size")
    ranks = RANKS.get(given.name, (1, 2))
    if len(given.shape) not in ranks:
        raise RequestError(422, f"inputs.{given.name}.shape: expected {ranks[0]} dimension(s)")


def _binary_tensor(given: Input, raw: memoryview) -> np.ndarray:
    try:
        return from_bytes(raw, given.datatype, tuple(given.shape))
    except ValueError as e:
        raise RequestError(400, f"inputs.{given.name}: {e}") from e


def _json_tensor(given: Input) -> np.ndarray:
    assert given.data is not None
    where = f"inputs.{given.name}.data"
    nested = bool(given.data) and isinstance(given.data[0], list)
    try:
        NUMBERS[given.datatype in INTEGERS, nested].validate_python(given.data, strict=True)
    except ValidationError as e:
        raise body_error(e, where) from e
    try:
        return from_numbers(given.data, given.datatype, tuple(given.shape))
    except ValueError as e:
        raise RequestError(422, f"{where}: {' '.join(str(e).split())}") from e


def _arguments(operation: OperationName, parameters: dict[str, Any]) -> AnyParameters:
    try:
        return PARAMETERS[operation].model_validate(parameters)
    except ValidationError as e:
        raise body_error(e, "parameters") from e


def _rows(main: np.ndarray, operation: OperationName) -> tuple[int, np.ndarray | None]:
    if operation == "sample":
        if main.shape != (1,) or main[0] < 1:
            raise RequestError(422, "inputs.n: must be one positive number, shape [1]")
        return int(main[0]), None
    if not len(main):
        raise RequestError(422, "inputs.activations: must have at least one row")
    if len(main) > MOST_ROWS:
        raise RequestError(413, f"rows: {len(main)} requested, at most {MOST_ROWS} per request; send several")
    return len(main), main


def _wanted(asked: Inference, arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, bool]]:
    for output in (Output(name=name) for name in arrays) if asked.outputs is None else asked.outputs:
        if output.name not in arrays:
            raise RequestError(422, f"outputs.{output.name}: not in this answer; it has {', '.join(arrays)}")
        chosen = None if output.parameters is None else output.parameters.binary_data
        yield output.name, asked.binary if chosen is None else chosen
