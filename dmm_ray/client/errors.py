"""Exceptions of the client: the endpoint refuses a request or is unavailable."""

from __future__ import annotations

from dmm_ray.errors import CheckFailed, UserError


class ClientError(UserError):
    """A request that the endpoint (or this client, before it was sent) refuses: asking again will not help.

    Args:
        message: the endpoint's own line, which names the field and the remedy.
        status: of its answer; 0 if nothing was sent.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class UnavailableError(CheckFailed):
    """No answer: the endpoint cannot be reached, is too busy or too slow, or failed."""
