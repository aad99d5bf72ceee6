"""The .jsonl and .txt formats, plain or compressed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, Protocol

import numpy as np

from dmm_ray.text.documents import json_content, plain_content
from dmm_ray.text.formats.base import STRIDE, RecordBlock, Source, TextFile
from dmm_ray.text.formats.splitting import END_OF_TEXT, MARKED, PARAGRAPHS, Format, Splitter, separated_by
from dmm_ray.text.formats.streams import READ_BYTES, decompressed


class _HasMarksError(Exception):
    """A file read as paragraphs contains ``<|endoftext|>``."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Delimited(Source):
    """Documents between separators. Reading an uncompressed file may start at every 64th document."""

    rule: Format
    codec: str | None

    @property
    def unit(self) -> str:
        """A line of .jsonl, or a document of .txt."""
        return "line" if self.rule.is_json else "document"

    def blocks(self, file: BinaryIO, place: int = 0) -> Iterator[RecordBlock]:
        """The documents starting from byte offset ``place``."""
        file.seek(place)
        stream, splitter, size = self._stream(file), Splitter(self.rule, place), READ_BYTES
        while chunk := stream.read(size):
            block = self._block(splitter.feed(chunk))
            size = READ_BYTES if block.raws else 2 * size  # doubling keeps the cost of long documents linear
            yield block
        yield self._block(splitter.finish())

    def place(self, starts: np.ndarray, number: int) -> tuple[int, int]:
        """The last kept offset up to ``number``, or the beginning of a compressed file."""
        return (number // STRIDE * STRIDE, int(starts[number // STRIDE])) if len(starts) else (0, 0)

    def _stream(self, file: BinaryIO) -> _Readable:
        return decompressed(file, self.codec)

    def _block(self, pieces: Iterator[tuple[int, bytes]]) -> RecordBlock:
        found = list(pieces)
        parse = partial(json_content, text_field=self.text_field) if self.rule.is_json else plain_content
        raws = [raw for _, raw in found]
        offsets = [] if self.codec else [offset for offset, _ in found]
        return RecordBlock(raws, parse, sum(map(len, raws), len(raws)), offsets)


class _Unmarked(Delimited):
    """Paragraphs of a file; raises ``_HasMarksError`` at the first ``<|endoftext|>``."""

    def _stream(self, file: BinaryIO) -> _Readable:
        return _Watched(super()._stream(file))


class _Watched:
    """A stream that must not contain ``<|endoftext|>``."""

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream
        self._tail = b""

    def read(self, size: int) -> bytes:
        chunk, mark = self._stream.read(size), END_OF_TEXT.encode()
        seen = self._tail + chunk
        if mark in seen:
            raise _HasMarksError
        self._tail = seen[-len(mark) :]
        return chunk


def scan_txt(uri: str, text_field: str, codec: str | None, separator: str | None) -> TextFile:
    """Scan a .txt file. Without a ``separator``, the part up to the first ``<|endoftext|>``, if any, is read twice."""
    if separator is not None:
        return Delimited(text_field, separated_by(separator), codec).scan(uri)
    try:
        found = _Unmarked(text_field, PARAGRAPHS, codec).scan(uri)
        return replace(found, source=Delimited(text_field, PARAGRAPHS, codec))
    except _HasMarksError:
        return Delimited(text_field, MARKED, codec).scan(uri)
