"""Errors of the client: the endpoint refuses a request, or does not answer."""

from __future__ import annotations

from dmm_ray.errors import CheckFailed, UserError


class ClientError(UserError):
    """A request that the endpoint (or this client, before sending it) refuses; retrying will not help.

    Args:
        message: the endpoint's own line, which names the field and the remedy.
        status: HTTP status of the answer; 0 if nothing was sent.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class UnavailableError(CheckFailed):
    """No answer: the endpoint is unreachable, too busy or too slow, or it failed."""
