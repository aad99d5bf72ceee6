"""The HTTP side: reads, checks and limits requests, passes their rows to the priors. Needs no torch."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from dmm_ray.config import versions
from dmm_ray.serving import errors
from dmm_ray.serving.batching import Columns
from dmm_ray.serving.calls import PriorInfo, check_finite, to_call
from dmm_ray.serving.config import Limits
from dmm_ray.serving.schemas import BODIES, Body, request_schema

logger = logging.getLogger(__name__)
READY_TIMEOUT_S = 10.0
DESCRIPTION = """Log-probabilities, denoising, samples and meta-neurons of language-model activations.

A row's answer depends on that row, its id, the arguments and the seed alone.
Limits of a request: {max_rows} rows, {max_body_bytes} bytes, {max_steps} steps, {max_probes} probes.
Priors: {names}; the first is the default."""
BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(request: Request, most: int) -> bytes:
    """A request's body. Raises RequestError 413 as soon as more than ``most`` bytes are announced or came."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > most:
        raise errors.RequestError(
            413, f"body: {announced} bytes, at most {most} in one request; send several"
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise errors.RequestError(413, f"body: more than {most} bytes in one request; send several")
    return bytes(body)


def parse(kind: type[BodyT], body: bytes) -> BodyT:
    """A body as the model ``kind``. Raises RequestError 400 or 422."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        raise errors.body_error(e) from e


def encode(columns: Columns) -> bytes:
    """An answer as JSON; a NaN inside a column becomes null."""
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in columns.items()}
    return to_json(plain, inf_nan_mode="null")


class Api:
    """The routes of the application.

    Args:
        priors: a handle to the deployment of each prior, by name; the first is the default.
        limits: what one request may ask for.
        retry_after_s: what refused requests are told.
    """

    def __init__(self, priors: dict[str, DeploymentHandle], limits: Limits, retry_after_s: float) -> None:
        self._priors = priors
        self._limits = limits
        self._retry_after_s = retry_after_s
        self._known: dict[str, PriorInfo] = {}
        self._answered = dict.fromkeys(priors, -math.inf)

    def build(self) -> FastAPI:
        """The ASGI application that Serve runs."""
        description = DESCRIPTION.format(**self._limits.model_dump(), names=", ".join(self._priors))
        api = FastAPI(title="dmm-ray", version=versions()["dmm-ray"], description=description)
        errors.install_handlers(api)
        for body, answer in BODIES:
            api.post(
                f"/v1/{body.OPERATION}",
                summary=body.__doc__,
                response_class=JSONResponse,
                responses={200: {"model": answer}, **errors.DOCUMENTED},
                openapi_extra={"requestBody": request_schema(body)},
            )(self._route(body))
        unready: dict[int | str, dict[str, Any]] = {503: errors.DOCUMENTED[503]}
        api.get("/v2/health/live", summary="Is the HTTP side up?")(self._live)
        api.get("/v2/health/ready", summary="Does every prior answer?", responses=unready)(self._ready)
        return api

    def _route(self, kind: type[Body]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            body = parse(kind, await read_body(request, self._limits.max_body_bytes))
            name = next(iter(self._priors)) if body.model is None else body.model
            if name not in self._priors:
                raise errors.RequestError(
                    404, f"model: no such prior here; there are {', '.join(self._priors)}"
                )
            call, rows = to_call(body, await self._info(name), self._limits)
            columns = await self._answer(name, self._priors[name].compute.remote(call, rows))
            check_finite(columns)
            return Response(encode(columns), media_type="application/json")

        route.__name__ = kind.OPERATION
        return route

    async def _info(self, name: str) -> PriorInfo:
        if name not in self._known:
            self._known[name] = await self._answer(name, self._priors[name].describe.remote())
        return self._known[name]

    async def _answer(self, name: str, response: DeploymentResponse) -> Any:
        """What a prior answers. Raises RequestError 503 if its queue is full or its process has gone.

        Serve puts its own handler of these errors into the ASGI application, whose answer is not JSON.
        """
        try:
            found = await response
        except BackPressureError as e:
            raise errors.RequestError(503, "the queue is full; try again later", self._retry_after_s) from e
        except (RayServeException, RayActorError) as e:
            logger.warning("prior %s did not answer: %s", name, type(e).__name__)
            raise errors.RequestError(503, "the prior is restarting; try again", self._retry_after_s) from e
        self._answered[name] = time.monotonic()
        return found

    async def _live(self) -> dict[str, bool]:
        return {"live": True}

    async def _ready(self) -> Response:
        waiting = [name for name in self._priors if not await self._is_up(name)]
        if waiting:
            return errors.answer(503, f"not ready: {', '.join(waiting)}", self._retry_after_s)
        return JSONResponse({"ready": True})

    async def _is_up(self, name: str) -> bool:
        """Whether a prior answers now; one whose queue is full does if others get their answers meanwhile."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._priors[name].describe.remote()
        except (BackPressureError, TimeoutError):
            return self._answered[name] > start - READY_TIMEOUT_S
        except (RayServeException, RayError):
            return False
        return True
