"""Writes a unit's results: a shard of activations with their moments, or a table with its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmm_ray.batch.operations import ACTIVATION, FEATURES, Found
from dmm_ray.files import join
from dmm_ray.store.manifest import (
    ROW_GROUP_ROWS,
    FileEntry,
    Manifest,
    Record,
    moments_name,
    shard_name,
    write_moments,
)
from dmm_ray.store.moments import Moments
from dmm_ray.store.reader import Rows
from dmm_ray.store.writer import whole_file, write_shard
from dmm_ray.units.unit import Unit

QUANTILES = np.linspace(0, 1, 101)
SUMMARISED = ("nats_per_dim", "velocity_error")
"""Columns whose quantiles are recorded."""


def write_unit(
    out: str, manifest: Manifest, unit: Unit, rows: Rows, found: Found, moments: Moments | None
) -> Record:
    """Write the files of a unit, a table or activations with ``moments``; returns the record, to be written last."""
    layer = str(manifest.layers[0])
    if moments is None:
        files = _write_table(out, manifest, unit.unit, rows, found)
    else:
        files = _write_activations(out, manifest, unit.unit, rows, found[ACTIVATION], moments)
    return Record(
        config_hash=manifest.config_hash,
        unit=unit.unit,
        first_document=unit.first,
        documents=unit.stop - unit.first,
        failed=(),
        long=0,
        tokens=0,
        padding=0,
        rows=len(rows.doc),
        excluded=0,
        nonfinite={layer: 0},
        outliers={layer: 0},
        files=files,
        figures=unit_figures(rows, found) if moments is None else {},
    )


def _write_activations(
    out: str, manifest: Manifest, unit: int, rows: Rows, x: Tensor, moments: Moments
) -> dict[str, FileEntry]:
    layer = manifest.layers[0]
    shard, beside = shard_name(layer, unit), moments_name(unit)
    return {
        shard: write_shard(join(out, shard), x, rows.doc, rows.position, rows.token_id),
        beside: write_moments(out, beside, {layer: moments}),
    }


def _write_table(out: str, manifest: Manifest, unit: int, rows: Rows, found: Found) -> dict[str, FileEntry]:
    assert manifest.derived is not None
    name = shard_name(manifest.layers[0], unit)
    table = make_table(rows, list(manifest.derived.columns), found)
    with (
        whole_file(join(out, name)) as f,
        pq.ParquetWriter(
            f,
            table.schema,
            compression={c: "none" if c == FEATURES else "zstd" for c in table.column_names},
            use_dictionary=["doc", "position", "token_id"],
            write_statistics=["doc", "position"],
        ) as parquet,
    ):
        parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
    return {name: f.entry}


def make_table(rows: Rows, columns: Sequence[str], found: Found) -> pa.Table:
    """The rows' ids and ``columns``: float32, null if NaN or missing; features are bytes, other arrays are lists."""
    names = {
        "doc": pa.array(rows.doc),
        "position": pa.array(rows.position),
        "token_id": pa.array(rows.token_id),
    }
    table = pa.table(names | {column: _array(column, found.get(column), len(rows.doc)) for column in columns})
    if FEATURES not in found:
        return table
    dtype, width = str(found[FEATURES].dtype).removeprefix("torch."), found[FEATURES].shape[1]
    return table.replace_schema_metadata({"dtype": dtype, "features": str(width), "byte_order": "little"})


def _array(name: str, values: Tensor | None, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, pa.float32())
    if values.ndim == 1:
        array = values.to(torch.float32).numpy()
        return pa.array(array, mask=np.isnan(array))
    if name != FEATURES:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1).numpy()), values.shape[1])
    raw = values.contiguous()
    kind = pa.binary(raw.shape[1] * raw.dtype.itemsize)
    return pa.Array.from_buffers(kind, n, [None, pa.py_buffer(raw.view(torch.uint8).numpy())])


def unit_figures(rows: Rows, found: Found) -> dict[str, Any]:
    """Number of documents with rows, count and mean of each score's finite values, and quantiles of the main score."""
    scores = {name: values.numpy().astype(np.float64) for name, values in found.items() if values.ndim == 1}
    there = {name: values[np.isfinite(values)] for name, values in scores.items()}
    return {
        "documents": len(np.unique(rows.doc)),
        "means": {name: [len(v), float(v.mean())] for name, v in there.items() if len(v)},
        "quantiles": {
            name: np.quantile(there[name], QUANTILES).tolist()
            for name in SUMMARISED
            if len(there.get(name, ()))
        },
    }
