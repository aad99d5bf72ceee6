"""The deployments behind the HTTP side: calls of their handles, with failures as refusals of the request."""

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
"""How long a prior's shape is believed: an update may have put another in its place."""


class DeploymentClient:
    """One deployment.

    Args:
        handle: Serve's handle to it.
        what: its name in messages.
        timeout_s: longest wait for an answer, queueing included.
        retry_after_s: what refused requests are told.
    """

    def __init__(self, handle: DeploymentHandle, what: str, timeout_s: float, retry_after_s: float) -> None:
        self._handle = handle
        self._what = what
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s
        self._answered = -math.inf

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What ``method`` of the deployment returns. Cancelling this cancels the call.

        Raises:
            RequestError: 503 if its queue is full, its process has gone or no answer comes in time.
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
        """What the generator ``method`` yields; the wait is limited for each item. Raises as ``ask`` does.

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
        """Whether it answers now; one whose queue is full does if others get their answers meanwhile."""
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
        """Make the failures of Serve itself refusals.

        Serve puts its own handler of these errors into the ASGI application, whose answer is not JSON.
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
        """The prior that a request means. Raises RequestError 404 for one that is not here."""
        if name is None:
            return self.names[0]
        if name not in self._backends:
            raise RequestError(404, f"model: no such prior here; there are {', '.join(self.names)}")
        return name

    async def info(self, name: str) -> PriorInfo:
        """A prior's shape, at most a second old. Raises RequestError 503."""
        found, asked = self._known.get(name, (None, -math.inf))
        if found is None or time.monotonic() - asked > INFO_LIFE_S:
            found = await self._backends[name].ask("describe")
            self._known[name] = (found, time.monotonic())
        return found

    async def compute(self, name: str, call: Call, rows: Rows) -> Columns:
        """A prior's answer, finite. Raises RequestError 503, or 422 naming a row without a finite answer."""
        columns = await self._backends[name].ask("compute", call, rows)
        check_finite(columns)
        return columns

    async def is_up(self, name: str) -> bool:
        """Whether a prior answers now."""
        return await self._backends[name].is_up()
