"""Errors of requests: a status and one line."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dmm_ray.serving.schemas import ErrorAnswer

STATUSES = {
    400: "Malformed body",
    401: "Missing or invalid token",
    404: "No such model or route",
    408: "The body did not arrive in time",
    413: "Body size, rows, steps, probes or work exceed a limit",
    422: "A field is missing, unknown or invalid",
    503: "The queue is full, or a process is restarting or took too long: retry after Retry-After seconds",
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}


ROW_FIELDS = (("activations",), ("ids",), ("u",))
"""Fields with one entry per row."""


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status of the answer.
        message: one line that names the field and the remedy.
        retry_after_s: seconds after which the same request may succeed; None if it never will.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def body_error(error: ValidationError, within: str = "") -> RequestError:
    """The first error in a body: 400 if it is not JSON, else 422 (413 for too many rows) naming the field.

    ``within`` is a prefix for the field's path.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"body: {first['msg'].removeprefix('Invalid JSON: ')}; send one JSON object")
    path = [*filter(None, [within]), *(str(part) for part in first["loc"])]
    if first["type"] == "extra_forbidden":
        return RequestError(422, ".".join([*path, first["msg"]]))
    field = ".".join(path) or "body"
    # 413 means that fewer rows would be accepted: a client then halves its request.
    too_many = first["type"] == "too_long" and first["loc"] in ROW_FIELDS
    return RequestError(413 if too_many else 422, f"{field}: {first['msg']}")
