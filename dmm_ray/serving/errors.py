"""What a request that cannot be answered is told: a status and one line."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dmm_ray.serving.schemas import ErrorAnswer

STATUSES = {
    400: "Malformed body",
    401: "A token is needed",
    404: "No such model or address",
    408: "The body came too slowly",
    413: "Body, rows, steps, probes or work above a limit",
    422: "A field is missing, unknown or wrong",
    503: "The queue is full, the prior is restarting or took too long: try again after Retry-After seconds",
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}


ROW_FIELDS = (("activations",), ("ids",), ("u",))
"""Fields with one entry per row."""


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: of the HTTP answer.
        message: one line that names the field and the remedy.
        retry_after_s: when the same request may succeed, if ever.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def body_error(error: ValidationError, within: str = "") -> RequestError:
    """The first problem of a body: 400 where it is not JSON, else 422 naming the field, inside ``within``."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"body: {first['msg'].removeprefix('Invalid JSON: ')}; send one JSON object")
    path = [*filter(None, [within]), *(str(part) for part in first["loc"])]
    if first["type"] == "extra_forbidden":
        return RequestError(422, ".".join([*path, first["msg"]]))
    field = ".".join(path) or "body"
    # 413 says that fewer rows would be taken; a client then halves its request.
    too_many = first["type"] == "too_long" and first["loc"] in ROW_FIELDS
    return RequestError(413 if too_many else 422, f"{field}: {first['msg']}")
