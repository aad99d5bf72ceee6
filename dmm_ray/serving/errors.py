"""Failures as HTTP answers: every one is ``{"error": "one line"}`` with a fitting status."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray.exceptions import RayTaskError
from starlette.exceptions import HTTPException

from dmm_ray.errors import UserError
from dmm_ray.serving.schemas import ErrorAnswer

logger = logging.getLogger(__name__)
Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]

STATUSES = {
    400: "Malformed JSON",
    404: "No such model or address",
    413: "Body, rows, steps, probes or work above a limit",
    422: "A field is missing, unknown or wrong",
    503: "The queue is full or the prior is restarting: try again after Retry-After seconds",
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: of the HTTP answer.
        message: one line that names the field and the mend.
        retry_after_s: when the same request may succeed, if ever.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def body_error(error: ValidationError) -> RequestError:
    """The first problem of a body: 400 where it is not JSON, else 422 naming the field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"body: {first['msg'].removeprefix('Invalid JSON: ')}; send one JSON object")
    if first["type"] == "extra_forbidden":
        return RequestError(422, first["msg"])
    field = ".".join(str(part) for part in first["loc"]) or "body"
    return RequestError(413 if first["type"] == "too_long" else 422, f"{field}: {first['msg']}")


def answer(status: int, message: str, retry_after_s: float | None = None) -> JSONResponse:
    """An error answer, with Retry-After in whole seconds where a retry makes sense."""
    headers = None if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    return JSONResponse({"error": message}, status, headers)


def install_handlers(api: FastAPI) -> None:
    """Make every failure inside ``api`` an error answer."""

    async def refused(_: Request, e: Exception) -> JSONResponse:
        assert isinstance(e, RequestError)
        return answer(e.status, e.message, e.retry_after_s)

    async def http(_: Request, e: Exception) -> JSONResponse:
        assert isinstance(e, HTTPException)
        return answer(e.status_code, str(e.detail))

    async def bad_input(_: Request, e: Exception) -> JSONResponse:
        return answer(422, str(e.cause if isinstance(e, RayTaskError) else e))

    async def bug(_: Request, e: Exception) -> JSONResponse:
        logger.error("request failed", exc_info=e)
        return answer(500, "internal error; the log of the endpoint says more")

    handlers: dict[type[Exception], Handler] = {
        RequestError: refused,
        HTTPException: http,
        UserError: bad_input,
        Exception: bug,
    }
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)
