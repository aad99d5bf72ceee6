"""The outermost middleware: tokens, request ids, the access log, metrics, and answers to bugs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmm_ray.serving.http.answers import failure
from dmm_ray.serving.http.auth import OPEN_PATHS, AccessTokens
from dmm_ray.serving.metrics import Answered

logger = logging.getLogger("ray.serve.dmm")
SANE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
UNROUTED = "unrouted"


class AccessMiddleware:
    """ASGI middleware around the whole application.

    Serve's proxy accepts or generates ``X-Request-ID`` and adds it to the answer; here it is logged.

    Args:
        app: the application.
        tokens: accepted tokens; None disables authentication.
        record: called once per request, after its answer has been sent.
    """

    def __init__(self, app: ASGIApp, tokens: AccessTokens | None, record: Callable[[Answered], None]) -> None:
        self._app = app
        self._tokens = tokens
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, head = time.monotonic(), 0, scope["method"] == "HEAD"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            elif head:
                message = {**message, "body": b""}
            await send(message)

        if head:  # as GET, without the body (RFC 9110, section 9.3.2)
            scope = {**scope, "method": "GET"}

        try:
            await (self._app if self._admits(scope) else _refuse)(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed", request_id(scope))
            if status:
                raise
            await failure(500, "internal error; see the endpoint's log")(scope, receive, watched)
        finally:
            found = _answered(scope, status, time.monotonic() - start)
            self._record(found._replace(method="HEAD") if head else found)

    def _admits(self, scope: Scope) -> bool:
        return (
            self._tokens is None
            or _path(scope) in OPEN_PATHS
            or self._tokens.admit(Headers(scope=scope).get("authorization"))
        )


def request_id(scope: Scope) -> str:
    """The request's id if it is safe to log, else ``-``."""
    found = Headers(scope=scope).get("x-request-id", "")
    return found if SANE_ID.fullmatch(found) else "-"


def log_access(answered: Answered) -> None:
    """Log one line per request."""
    logger.info(
        "%s %s %d rows=%d ms=%.1f id=%s",
        answered.method,
        answered.route,
        answered.status,
        answered.rows,
        answered.seconds * 1000,
        answered.request_id,
    )


def _path(scope: Scope) -> str:
    """The path inside the application."""
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    answer = failure(401, "Authorization: send `Bearer TOKEN` with one of the endpoint's tokens")
    await answer(scope, receive, send)


def _answered(scope: Scope, status: int, seconds: float) -> Answered:
    path = _path(scope)
    route = getattr(scope.get("route"), "path", path if path in OPEN_PATHS else UNROUTED)
    rows = scope.get("state", {}).get("rows", 0)
    method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS") else "other"
    return Answered(method, route, status, rows, seconds, request_id(scope))
