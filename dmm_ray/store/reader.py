"""Reads a finished activation store: row groups, statistics, and the rows of a part of the documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.failures import concerning
from dmm_ray.files import absolute, filesystem, is_local, join, plain_errors
from dmm_ray.store.manifest import (
    STATISTICS,
    Manifest,
    Record,
    read_manifest,
    read_moments,
    read_record,
    record_name,
    shard_name,
)
from dmm_ray.store.moments import Moments
from dmm_ray.store.split import Split, hash_documents

COLUMNS = ("activation", "doc", "position", "token_id")


class Rows(NamedTuple):
    """n rows of a layer. Columns that were not requested are empty."""

    activation: Tensor
    """(n, d) in the stored dtype."""
    doc: np.ndarray
    """(n,) int64."""
    position: np.ndarray
    """(n,) int32: token index from the start of the document."""
    token_id: np.ndarray
    """(n,) int32."""


@dataclass(frozen=True)
class RowGroup:
    """A contiguous block of rows that is read at once."""

    shard: int
    index: int
    """Index of the row group within the shard."""
    rows: int
    start: int
    """Index of its first row within the layer."""


class ActivationStore:
    """A finished store whose files have their recorded lengths; all layers have the same rows in the same order."""

    def __init__(self, uri: str, manifest: Manifest, records: Sequence[Record]) -> None:
        self.uri = uri
        self.manifest = manifest
        self.records = tuple(records)
        self.layers = manifest.layers
        self.d = manifest.d
        self.rows = sum(r.rows for r in records)
        self._groups = list(_row_groups(records, manifest.row_group_rows))
        self._statistics: dict[int, Moments] = {}

    @classmethod
    def open(cls, uri: str) -> ActivationStore:
        """Open the store at ``uri``, a folder or fsspec URI.

        Raises:
            UserError: there is no store, it is unfinished, or a file is missing or has the wrong length.

        Example:
            >>> store = ActivationStore.open("runs/demo/activations")
            >>> store.layers, store.d
            ((2,), 64)
        """
        uri = absolute(uri)
        manifest = read_manifest(uri)
        if manifest.derived and manifest.is_table:
            raise UserError(f"{uri}: contains the output of `dmm {manifest.derived.verb}`, not activations")
        sizes = file_sizes(uri)
        done = [unit for unit in range(manifest.units) if record_name(unit) in sizes]
        if len(done) < manifest.units or STATISTICS not in sizes:
            raise UserError(
                f"{uri}: extraction is not finished ({len(done)} of {manifest.units} units); "
                f"run the same `dmm {manifest.verb}` again"
            )
        records = [read_record(uri, unit) for unit in done]
        for record in records:
            if problem := length_problem(record, sizes):
                raise UserError(f"{join(uri, problem)}; run the same `dmm extract` again to recreate it")
            if record.config_hash != manifest.config_hash:
                name = join(uri, record_name(record.unit))
                raise UserError(
                    f"{name}: its configuration is not the manifest's; run `dmm verify` for details"
                )
        return cls(uri, manifest, records)

    def row_groups(self, layer: int) -> list[RowGroup]:
        """All row groups of ``layer``, in order.

        Example:
            >>> sum(group.rows for group in store.row_groups(2)) == store.rows
            True
        """
        self._check(layer)
        return list(self._groups)

    def read(self, layer: int, group: RowGroup, columns: Sequence[str] = COLUMNS) -> Rows:
        """The rows of a group; columns not in ``columns`` are returned empty.

        Example:
            >>> rows = store.read(2, store.row_groups(2)[0])
            >>> rows.activation.shape == (len(rows.doc), 64)
            True
        """
        self._check(layer)
        uri = join(self.uri, shard_name(layer, group.shard))
        with concerning(uri):
            file = _open(uri)
            table = file.read_row_group(
                group.index, columns=list(columns), use_threads=False
            ).combine_chunks()
        return to_rows(table, self.d, self.manifest.torch_dtype)

    def documents(self, layer: int, group: RowGroup) -> np.ndarray:
        """The document number of each row of a group, (n,) int64, without reading the activations.

        Example:
            >>> int(store.documents(2, store.row_groups(2)[0])[0])
            0
        """
        return self.read(layer, group, ("doc",)).doc

    def statistics(self, layer: int) -> Moments:
        """Moments of ``layer`` over all documents, excluding rows that contain NaN or Inf.

        Example:
            >>> store.statistics(2).mean.shape
            (64,)
        """
        self._check(layer)
        if not self._statistics:
            self._statistics = read_moments(self.uri, STATISTICS, self.layers)
        return self._statistics[layer]

    def select(self, layer: int, split: Split, part: int, max_rows: int | None = None, seed: int = 0) -> Rows:
        """The rows of one part of the documents, ordered by (doc, position).

        Args:
            layer: which layer.
            split: how documents are split.
            part: TRAIN, VALIDATION or TEST of ``dmm_ray.store.split``.
            max_rows: take complete documents, in an order drawn by ``seed``, as long as they fit (at least one);
                None takes all.
            seed: seed of that draw.

        Example:
            >>> from dmm_ray.store.split import TRAIN, Split
            >>> rows = store.select(2, Split(), TRAIN, max_rows=200)
            >>> rows.activation.shape == (len(rows.doc), 64)
            True
        """
        self._check(layer)
        docs = [self.documents(layer, group) for group in self._groups]
        found, counts = np.unique(np.concatenate([np.empty(0, np.int64), *docs]), return_counts=True)
        inside = split.of(found) == part
        kept = np.sort(_draw(found[inside], counts[inside], max_rows, seed))
        wanted = [np.flatnonzero(np.isin(doc, kept)) for doc in docs]
        return self.gather(layer, self._groups, wanted)

    def document(self, layer: int, doc: int) -> Rows:
        """The rows of one document, ordered by position; may be empty.

        Example:
            >>> store.document(2, 0).position[:3].tolist()
            [1, 2, 3]
        """
        self._check(layer)
        units = [r.unit for r in self.records if r.first_document <= doc < r.first_document + r.documents]
        groups = [group for group in self._groups if group.shard in units]
        return self.gather(layer, groups, [np.flatnonzero(self.documents(layer, g) == doc) for g in groups])

    def gather(self, layer: int, groups: Sequence[RowGroup], wanted: Sequence[np.ndarray]) -> Rows:
        """The rows ``wanted[i]`` (indices) of each ``groups[i]``, in order; groups without wanted rows are not read.

        Example:
            >>> group = store.row_groups(2)[0]
            >>> store.gather(2, [group], [np.array([0, 2])]).activation.shape
            torch.Size([2, 64])
        """
        full = [(group, index) for group, index in zip(groups, wanted, strict=True) if len(index)]
        return _concatenate(
            (self.read(layer, group) for group, _ in full),
            [index for _, index in full],
            self.d,
            self.manifest.torch_dtype,
        )

    def _check(self, layer: int) -> None:
        if layer not in self.layers:
            raise UserError(
                f"layer: {self.uri} has no layer {layer}; it has {', '.join(map(str, self.layers))}"
            )


def file_sizes(uri: str) -> dict[str, int]:
    """Length in bytes of every file of the store at ``uri``, keyed by path relative to the store."""
    fs, path = filesystem(uri)
    root = path.rstrip("/")
    if is_local(uri):
        return {name[len(root) + 1 :]: size for name, size in _walk(root)}
    with plain_errors(uri):
        found = fs.find(root, detail=True)
    return {name[len(root) + 1 :]: int(e["size"]) for name, e in found.items() if not name.endswith("/")}


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    """Path and length of every file below a local folder; files deleted in the meantime are skipped."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path)
            else:
                with suppress(FileNotFoundError):
                    yield entry.path, entry.stat().st_size


def length_problem(record: Record, sizes: dict[str, int]) -> str | None:
    """Describes the first file of ``record`` that is missing or has the wrong length; None if there is none."""
    for name, entry in record.files.items():
        if name not in sizes:
            return f"{name}: missing"
        if sizes[name] != entry.bytes:
            return f"{name}: {sizes[name]} bytes, but its record says {entry.bytes}"
    return None


def to_rows(table: pa.Table, d: int, dtype: torch.dtype) -> Rows:
    """The columns of a shard's table, copied into arrays that own their memory."""
    activation = torch.empty(0, d, dtype=dtype)
    if "activation" in table.column_names:
        activation = _activations(table.column("activation"), d, dtype)
    return Rows(
        activation,
        *(
            table.column(name).to_numpy().copy() if name in table.column_names else np.empty(0, kind)
            for name, kind in (("doc", np.int64), ("position", np.int32), ("token_id", np.int32))
        ),
    )


def _activations(column: pa.ChunkedArray, d: int, dtype: torch.dtype) -> Tensor:
    rows = empty_rows(len(column), d, dtype)
    if not len(column):
        return rows
    out, at = records(rows), 0
    for chunk in column.chunks:
        n = len(chunk)
        stored = np.frombuffer(chunk.buffers()[1], dtype=out.dtype, count=chunk.offset + n)
        out[at : at + n] = stored[chunk.offset :]
        at += n
    return rows


def _row_groups(records: Sequence[Record], size: int) -> Iterator[RowGroup]:
    start = 0
    for record in records:
        for index, low in enumerate(range(0, record.rows, size)):
            rows = min(size, record.rows - low)
            yield RowGroup(record.unit, index, rows, start)
            start += rows


@lru_cache(maxsize=256)
def _footer(uri: str) -> pq.FileMetaData:
    with _source(uri) as source:
        return pq.read_metadata(source)


def _open(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(_source(uri), metadata=_footer(uri))


def _source(uri: str) -> pa.NativeFile:
    fs, path = filesystem(uri)
    return pa.memory_map(path) if is_local(uri) else pa.PythonFile(fs.open(path, "rb"), mode="r")


def _draw(docs: np.ndarray, counts: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """Documents in seeded order as long as their rows fit into ``max_rows``; at least one."""
    if max_rows is None or not len(docs):
        return docs
    order = np.argsort(hash_documents(docs, seed), kind="stable")
    fitting = int(np.searchsorted(np.cumsum(counts[order]), max_rows, side="right"))
    return docs[order[: max(fitting, 1)]]


def _concatenate(pieces: Iterable[Rows], wanted: Sequence[np.ndarray], d: int, dtype: torch.dtype) -> Rows:
    """The rows ``wanted`` of each piece. Uses numpy, so that reader threads do not start OpenMP threads."""
    n = sum(map(len, wanted))
    out = Rows(empty_rows(n, d, dtype), np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32))
    at = 0
    for piece, index in zip(pieces, wanted, strict=True):
        to = slice(at, at + len(index))
        records(out.activation)[to] = records(piece.activation)[index]
        for column, values in zip(out[1:], piece[1:], strict=True):
            column[to] = values[index]
        at = to.stop
    return out


def empty_rows(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised rows (n, d) from numpy, which uses huge pages: faults on small pages took 15 % of read time."""
    raw = torch.from_numpy(np.empty((n, d * dtype.itemsize), dtype=np.uint8))
    return raw.view(dtype) if n else torch.empty(0, d, dtype=dtype)  # strides of zero rows forbid a view


def records(rows: Tensor) -> np.ndarray:
    """Rows (n, d) viewed as n opaque values, without copying."""
    raw = rows.view(torch.uint8).numpy()
    return raw.view(np.dtype((np.void, raw.shape[1])))[:, 0]
