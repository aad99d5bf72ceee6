"""Context shared by all HTTP routes."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from dmm_ray.serving.config import Limits
from dmm_ray.serving.deployments.handles import DeploymentClient, Priors
from dmm_ray.serving.http.bodies import BodyT, parse, read_body


@dataclass(frozen=True)
class Context:
    """The deployments behind the routes and the limits of a request.

    Args:
        priors: the priors by name.
        subject: the language model of the text routes, if one is attached.
        limits: limits of one request.
        body_timeout_s: maximum time for a body to arrive, in seconds.
        retry_after_s: value of Retry-After for refused requests.
    """

    priors: Priors
    subject: DeploymentClient | None
    limits: Limits
    body_timeout_s: float
    retry_after_s: float

    async def read(self, request: Request) -> bytearray:
        """A request's body. Raises RequestError 400, 408, 413 or 422."""
        return await read_body(request, self.limits.max_body_bytes, self.body_timeout_s)

    async def read_json(self, request: Request, kind: type[BodyT]) -> BodyT:
        """A request's JSON body as the model ``kind``. Raises RequestError 400, 408, 413 or 422."""
        return parse(kind, await self.read(request))

    async def waiting_for(self) -> list[str]:
        """Names of the priors, and ``subject``, that are not answering."""
        found = [name for name in self.priors.names if not await self.priors.is_up(name)]
        if self.subject is not None and not await self.subject.is_up():
            found.append("subject")
        return found
