"""Reading request bodies, with bounds on time and on size, before and after decompression."""

from __future__ import annotations

import asyncio
import zlib
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from dmm_ray.serving.errors import RequestError, body_error

BodyT = TypeVar("BodyT", bound=BaseModel)
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
"""``wbits`` with which zlib detects which of the two formats a stream has."""


def parse(kind: type[BodyT], body: bytes | bytearray) -> BodyT:
    """A JSON body as the model ``kind``. Raises RequestError 400, 413 or 422."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        raise body_error(e) from e


async def read_body(request: Request, most: int, timeout_s: float) -> bytearray:
    """A request's body, decompressed if its encoding is gzip or deflate.

    Raises:
        RequestError: 413 as soon as more than ``most`` bytes are announced, received or decompressed; 408 if it is
            incomplete after ``timeout_s`` seconds; 400 if decompression fails; 422 for another encoding.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _received(request, most)
    except TimeoutError as e:
        raise RequestError(
            408, f"body: not complete after {timeout_s:g} s; send it faster or in parts"
        ) from e
    encoding = request.headers.get("content-encoding", "identity").lower()
    return body if encoding == "identity" else _inflated(body, encoding, most)


async def _received(request: Request, most: int) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    return body


def _inflated(body: bytearray, encoding: str, most: int) -> bytearray:
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise RequestError(422, "Content-Encoding: must be gzip, deflate or none")
    stream = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = stream.decompress(body, most + 1)
    except zlib.error as e:
        raise RequestError(400, f"body: not valid {encoding} ({e})") from e
    if len(plain) > most:
        raise _too_large(most)
    if not stream.eof or stream.unused_data:
        raise RequestError(400, f"body: {encoding} data must be one complete stream")
    return bytearray(plain)


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"body: more than {most} bytes; send several requests")
