"""Calls to the deployments behind the HTTP ingress, with failures turned into refusals of the request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from dmm_ray.serving.deployments.batching import Columns, Rows
from dmm_ray.serving.deployments.calls import Call, PriorInfo, check_finite
from dmm_ray.serving.errors import RequestError

logger = logging.getLogger("ray.serve.dmm")
READY_TIMEOUT_S = 10.0
INFO_LIFE_S = 1.0
"""How long a prior's shape is cached, since an update may replace the prior."""


class DeploymentClient:
    """Client of one deployment.

    Args:
        handle: Serve's handle to the deployment.
        what: its name in messages.
        timeout_s: maximum wait for an answer, including queueing.
        retry_after_s: value of Retry-After for refused requests.
    """

    def __init__(self, handle: DeploymentHandle, what: str, timeout_s: float, retry_after_s: float) -> None:
        self._handle = handle
        self._what = what
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s
        self._answered = -math.inf

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` of the deployment and return its result. Cancellation propagates to the call.

        Raises:
            RequestError: 503 if the queue is full, the replica is gone or there is no answer in time.
            Exception: whatever the method raised.
        """
        with self._refusals():
            response = getattr(self._handle, method).remote(*arguments)
            try:
                async with asyncio.timeout(self._timeout_s):
                    found = await response
            except (asyncio.CancelledError, TimeoutError):
                response.cancel()
                raise
        self._answered = time.monotonic()
        return found

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """The items of the generator ``method``; the timeout applies to each item. Raises as ``ask`` does.

        Closing this iterator ends the generator.
        """
        with self._refusals():
            response = getattr(self._handle.options(stream=True), method).remote(*arguments)
            try:
                while True:
                    async with asyncio.timeout(self._timeout_s):
                        item = await anext(response)
                    yield item
            except StopAsyncIteration:
                return
            finally:
                response.cancel()

    async def is_up(self) -> bool:
        """Whether it is answering; with a full queue, whether other requests have recently been answered."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._handle.describe.remote()
        except (BackPressureError, TimeoutError):
            return self._answered > start - READY_TIMEOUT_S
        except (RayServeException, RayError):
            return False
        return True

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn Serve's own failures into refusals.

        Otherwise, Serve's own handler in the ASGI application would answer these errors, and not in JSON.
        """
        try:
            yield
        except BackPressureError as e:
            raise self._refusal("the queue is full; try again later") from e
        except TimeoutError as e:
            raise self._refusal(
                f"no answer in {self._timeout_s:g} s; ask for fewer rows, steps or probes, or try again later"
            ) from e
        except (RayServeException, RayActorError) as e:
            logger.warning("%s did not answer: %s", self._what, type(e).__name__)
            raise self._refusal(f"the {self._what} is restarting; try again") from e

    def _refusal(self, message: str) -> RequestError:
        return RequestError(503, message, self._retry_after_s)


class Priors:
    """The priors by name; the first is the default."""

    def __init__(self, backends: dict[str, DeploymentClient]) -> None:
        self._backends = backends
        self._known: dict[str, tuple[PriorInfo, float]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the priors, the default one first."""
        return tuple(self._backends)

    def resolve(self, name: str | None) -> str:
        """The name of the requested prior. Raises RequestError 404 if there is none."""
        if name is None:
            return self.names[0]
        if name not in self._backends:
            raise RequestError(404, f"model: no such prior; available: {', '.join(self.names)}")
        return name

    async def info(self, name: str) -> PriorInfo:
        """A prior's shape, at most a second old. Raises RequestError 503."""
        found, asked = self._known.get(name, (None, -math.inf))
        if found is None or time.monotonic() - asked > INFO_LIFE_S:
            found = await self._backends[name].ask("describe")
            self._known[name] = (found, time.monotonic())
        return found

    async def compute(self, name: str, call: Call, rows: Rows) -> Columns:
        """A prior's answer. Raises RequestError 503, or 422 naming a row whose answer is NaN or Inf."""
        columns = await self._backends[name].ask("compute", call, rows)
        check_finite(columns)
        return columns

    async def is_up(self, name: str) -> bool:
        """Whether a prior is answering."""
        return await self._backends[name].is_up()
