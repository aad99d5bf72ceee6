"""From a well-formed body to a call of a prior: checks that depend on the prior's shape and on the limits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dmm_ray.serving.batching import Columns, Rows
from dmm_ray.serving.config import Limits
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.schemas import Arguments, Body, Encode, LogProb, Operation, RowsBody, SampleBody

NOT_ARGUMENTS = {"activations", "ids", "model", "n"}


class PriorInfo(NamedTuple):
    """What a request's check needs to know of a prior."""

    d: int
    layers: tuple[int, ...]
    n_blocks: int
    d_mlp: int
    precision: str
    """Of the network's products."""
    exact_trace: bool


class Call(NamedTuple):
    """An operation and its arguments, the seed included: rows of equal calls can share a solver run."""

    operation: Operation
    arguments: tuple[tuple[str, Any], ...]


def to_call(body: Body, info: PriorInfo, limits: Limits) -> tuple[Call, Rows]:
    """The call that a JSON ``body`` asks for, and its rows.

    Rows are ``ids`` int64 (n, 2) and, but for samples, ``activations`` float32 (n, d).

    Raises:
        RequestError: 413 above a limit, 422 for a field that does not fit the prior.
    """
    assert isinstance(body, RowsBody | SampleBody)
    n = body.n if isinstance(body, SampleBody) else len(body.activations)
    _check_limits(body, n, info, limits)
    _check_prior_has(body, info)
    rows = {"ids": _ids(_listed_ids(body.ids), n)}
    if isinstance(body, RowsBody):
        rows["activations"] = _matrix(body.activations, info.d)
    return _call(body), rows


def array_call(
    arguments: Arguments,
    n: int,
    activations: np.ndarray | None,
    ids: np.ndarray | None,
    info: PriorInfo,
    limits: Limits,
) -> tuple[Call, Rows]:
    """``to_call`` for rows that are arrays already.

    Args:
        arguments: what the operation is told.
        n: the number of rows.
        activations: float32 (n, any); None for samples.
        ids: int64 (n,) or (n, 2); None: 0, 1, ...
        info: the prior's shape.
        limits: what one request may ask for.

    Raises:
        RequestError: 413 above a limit, 422 for what does not fit the prior.
    """
    _check_limits(arguments, n, info, limits)
    _check_prior_has(arguments, info)
    rows = {"ids": _ids(ids, n)}
    if activations is not None:
        rows["activations"] = _fitting(activations, info.d)
    return _call(arguments), rows


def check_finite(columns: Columns) -> None:
    """Raises RequestError if the first column of an answer holds an infinity or NaN, naming the row."""
    first = next(iter(columns.values()))
    assert isinstance(first, np.ndarray)
    finite = np.isfinite(first.reshape(len(first), -1)).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RequestError(
            422, f"activations: row {row} has no finite answer; it is too far from what the prior models"
        )


def _call(arguments: Arguments) -> Call:
    return Call(arguments.OPERATION, tuple(sorted(arguments.model_dump(exclude=NOT_ARGUMENTS).items())))


def _check_limits(body: Arguments, n: int, info: PriorInfo, limits: Limits) -> None:
    steps, probes = getattr(body, "steps", 1), getattr(body, "probes", None)
    width = {"log_prob": 1, "encode": info.d_mlp * info.n_blocks}.get(body.OPERATION, info.d)
    if isinstance(body, Encode) and body.block is not None:
        width = info.d_mlp
    trace = 0 if probes is None else probes or info.d
    asked = {
        "rows": (n, limits.max_rows),
        "steps": (steps, limits.max_steps),
        "probes": (probes or 0, limits.max_probes),
        "numbers in the answer": (n * width, limits.max_values),
        "row passes (rows x steps x (2 + probes))": (n * steps * (2 + trace), limits.max_work),
    }
    for what, (count, most) in asked.items():
        if count > most:
            raise RequestError(413, f"{what}: {count} asked for, at most {most} in one request; send several")


def _check_prior_has(body: Arguments, info: PriorInfo) -> None:
    known = ", ".join(map(str, info.layers))
    if body.layer is None and len(info.layers) > 1:
        raise RequestError(422, f"layer: required; this prior models layers {known}")
    if body.layer is not None and body.layer not in info.layers:
        raise RequestError(422, f"layer: this prior models layers {known} (got {body.layer})")
    if isinstance(body, Encode) and body.block is not None and body.block >= info.n_blocks:
        raise RequestError(422, f"block: this prior has blocks 0 to {info.n_blocks - 1} (got {body.block})")
    if isinstance(body, LogProb) and body.probes == 0 and not info.exact_trace:
        raise RequestError(
            422, f"probes: give at least 1; an exact trace (0) is too costly at width {info.d}"
        )


def _listed_ids(ids: list[int | tuple[int, int]] | None) -> np.ndarray | None:
    if ids is not None and len({isinstance(i, int) for i in ids}) > 1:
        raise RequestError(422, "ids: all integers or all [document, position] pairs, not both")
    return None if ids is None else np.asarray(ids, dtype=np.int64)


def _ids(ids: np.ndarray | None, n: int) -> np.ndarray:
    array = np.arange(n) if ids is None else ids
    if len(array) != n:
        raise RequestError(422, f"ids: one for each of the {n} rows is needed (got {len(array)})")
    if array.ndim == 2 and array.shape[1] != 2:
        raise RequestError(422, f"ids: one number or two for a row (got {array.shape[1]})")
    return array if array.ndim == 2 else np.stack([array, np.zeros_like(array)], axis=1)


def _matrix(activations: list[list[float]], d: int) -> np.ndarray:
    for i, row in enumerate(activations):
        if len(row) != d:
            raise RequestError(
                422, f"activations: row {i} has {len(row)} numbers; this prior's activations have d = {d}"
            )
    with np.errstate(over="ignore"):
        return _fitting(np.asarray(activations, dtype=np.float64).astype(np.float32), d)


def _fitting(matrix: np.ndarray, d: int) -> np.ndarray:
    if matrix.shape[1] != d:
        raise RequestError(
            422, f"activations: rows have {matrix.shape[1]} numbers; this prior's activations have d = {d}"
        )
    if not math.isfinite(matrix.sum(dtype=np.float64)):
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise RequestError(422, f"activations.{row}.{column}: not a finite 32-bit float")
    return matrix
