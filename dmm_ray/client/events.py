"""Server-sent events, as the endpoint writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def events(chunks: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
    """Kind and JSON value of each event in a body that comes in ``chunks``."""
    waiting = b""
    for chunk in chunks:
        *whole, waiting = (waiting + chunk).split(b"\n\n")
        for one in whole:
            kind, _, data = one.partition(b"\n")
            yield kind.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))
