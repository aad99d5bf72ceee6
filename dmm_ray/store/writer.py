"""Writes shards: one Parquet file per unit and layer, written atomically and hashed while being written."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmm_ray.files import filesystem, is_local, plain_errors, whole
from dmm_ray.store.manifest import DTYPES, ROW_GROUP_ROWS, FileEntry


class HashingFile(io.RawIOBase):
    """A write-only file that counts the bytes written and hashes them in a background thread."""

    def __init__(self, target: IO[bytes], hasher: Executor) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self._hasher = hasher
        self._hashed: Future[None] = hasher.submit(self._digest.update, b"")
        self.bytes = 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        self._hashed.result()
        self._hashed = self._hasher.submit(self._digest.update, data)
        self._target.write(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self.bytes

    @property
    def entry(self) -> FileEntry:
        """Length and hash of the bytes written."""
        self._hashed.result()
        return FileEntry(bytes=self.bytes, sha256=self._digest.hexdigest())


@contextmanager
def whole_file(uri: str) -> Iterator[HashingFile]:
    """A file that appears under its name only if the block succeeds: by rename (local) or a single put."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        with tempfile.NamedTemporaryFile() as local, ThreadPoolExecutor(1) as hasher:
            yield HashingFile(local, hasher)
            local.flush()
            with plain_errors(uri):
                fs.put_file(local.name, path)
        return
    with ThreadPoolExecutor(1) as hasher, whole(path) as f:
        yield HashingFile(f, hasher)


def write_shard(
    uri: str, activation: Tensor, doc: np.ndarray, position: np.ndarray, token_id: np.ndarray
) -> FileEntry:
    """Write the rows of one layer of a unit.

    Args:
        uri: destination.
        activation: (n, d) contiguous, bfloat16 or float32, on the CPU.
        doc: (n,) int64.
        position: (n,) int32.
        token_id: (n,) int32.
    """
    n, d = activation.shape
    schema = shard_schema(d, activation.dtype)
    raw = activation.contiguous().view(torch.uint8).numpy()
    column = pa.Array.from_buffers(schema.field("activation").type, n, [None, pa.py_buffer(raw)])
    table = pa.Table.from_arrays(
        [column, pa.array(doc), pa.array(position), pa.array(token_id)], schema=schema
    )
    with (
        whole_file(uri) as f,
        pq.ParquetWriter(
            f,
            schema,
            compression={"activation": "none", "doc": "zstd", "position": "zstd", "token_id": "zstd"},
            use_dictionary=["doc", "position", "token_id"],
            write_statistics=["doc", "position"],
        ) as parquet,
    ):
        parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
    return f.entry


def shard_schema(d: int, dtype: torch.dtype) -> pa.Schema:
    """Columns of a shard; the metadata ``dtype`` and ``d`` describe the bytes of ``activation``."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    return pa.schema(
        [
            pa.field("activation", pa.binary(d * dtype.itemsize), nullable=False),
            pa.field("doc", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
        ],
        metadata={"dtype": name, "d": str(d), "byte_order": "little"},
    )
