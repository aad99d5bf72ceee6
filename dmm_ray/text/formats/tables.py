"""The .parquet and .arrow formats, the latter as saved by Hugging Face ``datasets``."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmm_ray.text.documents import MESSAGES, Content, record_content
from dmm_ray.text.formats.base import SCANNED_BYTES, RecordBlock, Source, Tally, TextFile
from dmm_ray.text.formats.streams import READ_BYTES, DamagedError, length, opened

BATCH_ROWS = 256
"""Rows per block of parquet; a block of arrow is a record batch as written (1000 rows by ``datasets``)."""
FILE_MARK = b"ARROW1"
"""Marker at the beginning and end of an Arrow IPC file."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class ArrowRows(Source):
    """Rows of an Arrow IPC stream, as written by ``datasets``, or of an IPC file (Feather version 2)."""

    @property
    def unit(self) -> str:
        """A row."""
        return "row"

    def blocks(self, file: BinaryIO, place: int = 0) -> Iterator[RecordBlock]:
        """All record batches.

        Raises:
            DamagedError: the file does not end with the end marker of a stream or file.
        """
        if file.read(len(FILE_MARK)) == FILE_MARK:
            yield from self._file_blocks(file)
            return
        file.seek(-min(len(END_OF_STREAM), length(file)), io.SEEK_END)
        if file.read() != END_OF_STREAM:
            raise DamagedError("the end marker of an Arrow stream is missing")
        file.seek(0)
        with pa.ipc.open_stream(pa.PythonFile(file, mode="r")) as reader:
            for batch in reader:
                yield _block(batch, self.text_field)
        if file.read(1):
            raise DamagedError("there is more data after the end of the stream")

    def _file_blocks(self, file: BinaryIO) -> Iterator[RecordBlock]:
        reader = pa.ipc.open_file(pa.PythonFile(file, mode="r"))
        for number in range(reader.num_record_batches):
            yield _block(reader.get_batch(number), self.text_field)


@dataclass(frozen=True)
class ParquetRows(Source):
    """Rows of parquet; only the requested column is read. Reading may start at every row group."""

    @property
    def unit(self) -> str:
        """A row."""
        return "row"

    def scan(self, uri: str) -> TextFile:
        """Count and index using only the footer; check the rows of the first 16 MiB.

        ``sha256`` is the hash of the footer, which contains the offset and size of all data and usually their minimum
        and maximum values, so the complete file need not be read.
        """
        with opened(uri) as file:
            footer = _footer(file)
            metadata = pq.ParquetFile(file).metadata
            tally = Tally(uri, self.unit)
            for block in takewhile(lambda _: tally.n_bytes < SCANNED_BYTES, self.blocks(file)):
                tally.add(block)
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            tally.starts = np.cumsum([0, *rows])[:-1].tolist()
            tally.documents = metadata.num_rows
            return tally.found(self, length(file), hashlib.sha256(footer).hexdigest())

    def blocks(self, file: BinaryIO, place: int = 0) -> Iterator[RecordBlock]:
        """The rows starting from row group ``place``."""
        table = pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        column = _wanted(table.schema_arrow.names, self.text_field)
        for group in range(place, table.num_row_groups):
            columns = [] if column is None else [column]
            for batch in table.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                yield _block(batch, self.text_field)

    def place(self, starts: np.ndarray, number: int) -> tuple[int, int]:
        """The row group that contains row ``number``."""
        group = int(np.searchsorted(starts, number, side="right")) - 1
        return int(starts[group]), group


def _footer(file: BinaryIO) -> bytes:
    """The metadata of a parquet file, as stored."""
    file.seek(-min(8, length(file)), io.SEEK_END)
    tail = file.read()
    if not tail.endswith(b"PAR1"):
        raise DamagedError("the parquet end marker is missing")
    stored = int.from_bytes(tail[:4], "little") + len(tail)
    if stored > length(file):
        raise DamagedError("the parquet footer is incomplete")
    file.seek(-stored, io.SEEK_END)
    return file.read()


def _wanted(names: list[str], text_field: str) -> str | None:
    return next((name for name in (text_field, MESSAGES) if name in names), None)


def _block(batch: pa.RecordBatch, text_field: str) -> RecordBlock:
    """The rows of a batch; values of the requested column are converted to Python objects on access."""
    name = _wanted(batch.schema.names, text_field)
    if name is None:
        return RecordBlock(
            range(len(batch)), lambda _: record_content({}, text_field), batch.nbytes + len(batch)
        )
    column = _as_bytes(batch.column(batch.schema.names.index(name)))
    return RecordBlock(range(len(batch)), partial(_content, name, column, text_field), column.nbytes)


def _content(name: str, column: pa.Array, text_field: str, row: int) -> Content:
    try:
        value = column[row].as_py()
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return Content(error="not valid UTF-8")
    return record_content({name: text}, text_field)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as bytes, so that invalid UTF-8 affects only its own row; other columns unchanged.

    Raises:
        pa.ArrowInvalid: the column's offsets are damaged.
    """
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    is_text = any(is_kind(plain.type) for is_kind in (*kinds, pa.types.is_binary, pa.types.is_large_binary))
    if is_text:
        plain = plain.cast(pa.large_binary())
    plain.validate(full=is_text)
    return plain
