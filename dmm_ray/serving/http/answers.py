"""Failures as HTTP answers: always ``{"error": "one line"}`` with an appropriate status."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayTaskError
from starlette.exceptions import HTTPException

from dmm_ray.errors import UserError
from dmm_ray.serving.errors import RequestError

Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]


def failure(
    status: int,
    message: str,
    retry_after_s: float | None = None,
    more: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error answer, with Retry-After in whole seconds if a retry makes sense, and ``more`` headers."""
    headers = dict(more or {})
    if retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": message}, status, headers)


def install_handlers(api: FastAPI) -> None:
    """Turn every refusal inside ``api`` into an error answer; bugs are handled by the gate in front of it."""

    async def refused(_: Request, e: Exception) -> JSONResponse:
        cause = e.cause if isinstance(e, RayTaskError) else e
        assert isinstance(cause, RequestError)
        return failure(cause.status, cause.message, cause.retry_after_s)

    async def http(_: Request, e: Exception) -> JSONResponse:
        assert isinstance(e, HTTPException)
        return failure(e.status_code, str(e.detail), more=e.headers)

    async def bad_input(_: Request, e: Exception) -> JSONResponse:
        return failure(422, str(e.cause if isinstance(e, RayTaskError) else e))

    handlers: dict[type[Exception], Handler] = {
        RequestError: refused,
        HTTPException: http,
        UserError: bad_input,
    }
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)
