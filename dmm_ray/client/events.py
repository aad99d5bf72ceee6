"""Server-sent events (WHATWG HTML, section 9.2.6)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

LINE_END = re.compile("\r\n|\n|\r")
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def events(chunks: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Type and data of each event in a body received in ``chunks``; a truncated last event is dropped.

    Example:
        >>> list(events(iter([b"event: token\\r\\nda", b"ta: 1\\r\\n\\r\\n"])))
        [('token', '1')]
    """
    kind, data = "", list[str]()
    for line in _lines(chunks):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield kind or "message", "\n".join(data)
            kind, data = "", []
        elif field == "event":
            kind = value
        elif field == "data":
            data.append(value)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Complete lines of UTF-8 text, ended by CRLF, LF or CR."""
    decoder, waiting, begun = codecs.getincrementaldecoder("utf-8")("replace"), "", False
    for chunk in chunks:
        waiting += decoder.decode(chunk)
        if not begun and waiting:
            waiting, begun = waiting.removeprefix(BOM), True
        # A CR at the end may be half of a CRLF.
        held = "\r" if waiting.endswith("\r") else ""
        *whole, waiting = LINE_END.split(waiting[: len(waiting) - len(held)])
        waiting += held
        yield from whole
    if waiting.endswith("\r"):
        yield waiting[:-1]
