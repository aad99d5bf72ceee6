"""From a well-formed body to a call of a prior, with checks that depend on the prior's shape and on the limits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dmm_ray.operations import OperationName
from dmm_ray.serving.config import Limits
from dmm_ray.serving.deployments.batching import Columns, Rows
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.schemas import (
    AnyBody,
    AnyParameters,
    EncodeParameters,
    LogProbParameters,
    RowsBody,
    SampleBody,
)

NOT_ARGUMENTS = {"activations", "ids", "model", "n"}


class PriorInfo(NamedTuple):
    """What the checks of a request need to know about a prior."""

    d: int
    layers: tuple[int, ...]
    n_blocks: int
    d_mlp: int
    precision: str
    """Precision of the network's products."""
    exact_trace: bool


class Call(NamedTuple):
    """An operation and its arguments, including the seed; rows of equal calls can share a solver run."""

    operation: OperationName
    arguments: tuple[tuple[str, Any], ...]


def to_call(body: AnyBody, info: PriorInfo, limits: Limits) -> tuple[Call, Rows]:
    """The call requested by a JSON ``body``, and its rows.

    Rows are ``ids`` int64 (n, 2), ``activations`` float32 (n, d) except for samples, and ``u`` float64 (n,) if there is
    one noise level per row.

    Raises:
        RequestError: 413 above a limit, 422 if a field does not fit the prior.
    """
    n = body.n if isinstance(body, SampleBody) else len(body.activations)
    _check_limits(body, n, info, limits)
    _check_prior_has(body, info)
    rows = {"ids": _ids(_listed_ids(body.ids), n)}
    if isinstance(body, RowsBody):
        rows["activations"] = _matrix(body.activations, info.d)
    if isinstance(levels := getattr(body, "u", None), list):
        rows["u"] = _levels(np.asarray(levels), n)
    return _call(body, rows), rows


def array_call(
    arguments: AnyParameters,
    n: int,
    activations: np.ndarray | None,
    ids: np.ndarray | None,
    info: PriorInfo,
    limits: Limits,
    levels: np.ndarray | None = None,
) -> tuple[Call, Rows]:
    """``to_call`` for rows that are already arrays.

    Args:
        arguments: arguments of the operation.
        n: number of rows.
        activations: float32 (n, any); None for samples.
        ids: int64 (n,) or (n, 2); None for 0, 1, ...
        info: the prior's shape.
        limits: limits of one request.
        levels: one noise level per row, float64 (n,); None for the one in ``arguments``.

    Raises:
        RequestError: 413 above a limit, 422 if something does not fit the prior.
    """
    _check_limits(arguments, n, info, limits)
    _check_prior_has(arguments, info)
    rows = {"ids": _ids(ids, n)}
    if activations is not None:
        rows["activations"] = _fitting(activations, info.d)
    if levels is not None:
        rows["u"] = _levels(levels, n)
    return _call(arguments, rows), rows


def check_finite(columns: Columns) -> None:
    """Raises RequestError naming the row if the first column of an answer contains NaN or Inf."""
    first = next(column for column in columns.values() if column is not None)
    assert isinstance(first, np.ndarray)
    finite = np.isfinite(first.reshape(len(first), -1)).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RequestError(
            422,
            f"activations: the answer for row {row} is NaN or Inf; the row is too far from what the prior models",
        )


def _call(arguments: AnyParameters, rows: Rows) -> Call:
    """The call for the rows; per-row noise levels stay with the rows, so that other requests can share the call."""
    told = arguments.model_dump(exclude=NOT_ARGUMENTS | (rows.keys() & {"u"}))
    return Call(arguments.NAME, tuple(sorted(told.items())))


def _levels(levels: np.ndarray, n: int) -> np.ndarray:
    if levels.shape != (n,):
        raise RequestError(
            422, f"u: expected one noise level, or one for each of the {n} rows (got {len(levels)})"
        )
    if not ((levels >= 0) & (levels <= 1)).all():
        raise RequestError(422, "u: noise levels must be from 0 to 1")
    return levels.astype(np.float64)


def _numbers(body: AnyParameters, info: PriorInfo) -> int:
    """Approximate number of values per row in the answer."""
    if isinstance(body, EncodeParameters):
        units = info.d_mlp * (info.n_blocks if body.block is None else 1)
        return units if body.top is None else 2 * body.top
    return info.d if body.NAME in ("denoise", "sample") else 1


def _check_limits(body: AnyParameters, n: int, info: PriorInfo, limits: Limits) -> None:
    steps, probes = getattr(body, "steps", 1), getattr(body, "probes", 0)
    asked = {
        "rows": (n, limits.max_rows),
        "steps": (steps, limits.max_steps),
        "probes": (probes, limits.max_probes),
        "numbers in the answer": (n * _numbers(body, info), limits.max_values),
        "row passes (rows x network evaluations, a probe counting half)": (
            n * body.passes(info.d),
            limits.max_work,
        ),
    }
    for what, (count, most) in asked.items():
        if count > most:
            raise RequestError(413, f"{what}: {count} requested, at most {most} per request; send several")


def _check_prior_has(body: AnyParameters, info: PriorInfo) -> None:
    known = ", ".join(map(str, info.layers))
    if body.layer is None and len(info.layers) > 1:
        raise RequestError(422, f"layer: required; this prior models layers {known}")
    if body.layer is not None and body.layer not in info.layers:
        raise RequestError(422, f"layer: this prior models layers {known} (got {body.layer})")
    if isinstance(body, EncodeParameters):
        if body.block is not None and body.block >= info.n_blocks:
            raise RequestError(
                422, f"block: this prior has blocks 0 to {info.n_blocks - 1} (got {body.block})"
            )
        units = info.d_mlp * (info.n_blocks if body.block is None else 1)
        if body.top is not None and body.top > units:
            raise RequestError(422, f"top: must be 1 to {units}, this prior's hidden units (got {body.top})")
    if isinstance(body, LogProbParameters) and body.probes == 0 and not info.exact_trace:
        raise RequestError(
            422, f"probes: give at least 1; an exact trace (0) is too costly at width {info.d}"
        )


def _listed_ids(ids: list[int | tuple[int, int]] | None) -> np.ndarray | None:
    if ids is not None and len({isinstance(i, int) for i in ids}) > 1:
        raise RequestError(422, "ids: must be all integers or all [document, position] pairs, not both")
    return None if ids is None else np.asarray(ids, dtype=np.int64)


def _ids(ids: np.ndarray | None, n: int) -> np.ndarray:
    array = np.arange(n) if ids is None else ids
    if len(array) != n:
        raise RequestError(422, f"ids: expected one for each of the {n} rows (got {len(array)})")
    if array.ndim == 2 and array.shape[1] != 2:
        raise RequestError(422, f"ids: expected one or two numbers per row (got {array.shape[1]})")
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
