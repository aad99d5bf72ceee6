"""Splits the bytes of a .jsonl or .txt file into documents.

A document is a line of .jsonl, or the text between separators of .txt: the given separator, else ``<|endoftext|>``
if the file contains it, else blank lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
_SPACE = b" \t\r\n"


class Format(NamedTuple):
    """A rule that splits a byte stream into documents."""

    separator: bytes
    """A regular expression over bytes."""
    is_json: bool = False
    keeps_blank: bool = True
    """Whether blank text between two separators counts as a document."""
    open_ended: bool = False
    """Whether more bytes could lengthen a match that ends in white space."""


LINES = Format(rb"\n", is_json=True)
MARKED = Format(re.escape(END_OF_TEXT.encode()))
PARAGRAPHS = Format(rb"\n(?:[ \t\r]*\n)+", keeps_blank=False, open_ended=True)


def separated_by(separator: str) -> Format:
    """Text split at every ``separator``."""
    return Format(re.escape(separator.encode()))


class Splitter:
    """Splits a stream, fed in chunks of any size, into documents, each with its byte offset.

    Blank text after the last separator is not a document. Splitting may start at the offset of any document.
    """

    def __init__(self, rule: Format, start: int = 0) -> None:
        self._rule = rule
        self._separator = re.compile(rule.separator)
        self._buffer = b""
        self._start = start

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The documents that are complete after ``chunk``, as (offset, bytes)."""
        buffer, at = self._buffer + chunk, 0
        limit = len(buffer.rstrip(_SPACE)) if self._rule.open_ended else len(buffer) + 1
        for match in self._separator.finditer(buffer):
            if match.end() >= limit:
                break
            piece = buffer[at : match.start()]
            if self._rule.keeps_blank or piece.strip():
                yield self._start + at, piece
            at = match.end()
        self._start += at
        self._buffer = buffer[at:]

    def finish(self) -> Iterator[tuple[int, bytes]]:
        """The last document, which is not followed by a separator."""
        if self._buffer.strip():
            yield self._start, self._buffer
        self._buffer = b""
