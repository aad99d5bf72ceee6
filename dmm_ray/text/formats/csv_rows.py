"""The .csv format, plain or compressed."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import BinaryIO

from dmm_ray.text.documents import Content, record_content
from dmm_ray.text.formats.base import RecordBlock, Source
from dmm_ray.text.formats.streams import DamagedError, VariantError, decompressed

BLOCK_ROWS = 64
"""Rows per block."""


@dataclass(frozen=True)
class CsvRows(Source):
    """Comma-separated rows below a header. Quoted fields may contain newlines; empty lines are skipped."""

    codec: str | None

    @property
    def unit(self) -> str:
        """A row, not counting the header."""
        return "row"

    def blocks(self, file: BinaryIO, place: int = 0) -> Iterator[RecordBlock]:
        """All rows, as lists of fields."""
        csv.field_size_limit(sys.maxsize)  # process-wide; allows fields of any length
        stream = decompressed(file, self.codec)
        with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
            rows = _rows(text)
            header = next(rows, [])
            if header.count(self.text_field) > 1:
                raise VariantError(
                    f"its header has {self.text_field!r} more than once; rename one of the columns"
                )
            parse = partial(_content, header, self.text_field)
            while block := list(islice(rows, BLOCK_ROWS)):
                yield RecordBlock(block, parse, sum(len(value) + 1 for row in block for value in row))


def _rows(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """The non-empty rows.

    Raises:
        DamagedError: the file ends inside quotes.
        VariantError: a quote inside a quoted field is not doubled.
    """
    at_end = False

    def lines() -> Iterator[str]:
        nonlocal at_end
        yield from text
        at_end = True

    reader, number = csv.reader(lines(), strict=True), 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as e:
            if at_end:  # only inside quotes does the reader ask for another line
                raise DamagedError(f"row {number}: a quote is never closed") from e
            raise VariantError(
                f'row {number}: a quote inside a quoted field must be doubled (""), not escaped with a backslash'
            ) from e
        if row is None:
            return
        if row:
            yield row
            number += 1


def _content(header: Sequence[str], text_field: str, row: Sequence[str]) -> Content:
    if len(row) != len(header):
        return Content(
            error=f"has {len(row)} fields, but the header has {len(header)}; quote fields that contain commas"
        )
    record = dict(zip(header, row, strict=True))
    if text_field not in record:
        return record_content({}, text_field)
    try:
        record[text_field].encode()
    except UnicodeEncodeError:
        return Content(error="not valid UTF-8")
    return Content(text=record[text_field])
