"""``POST /v1/*``: the operations on activations as human-readable JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from dmm_ray.operations import OPERATIONS
from dmm_ray.serving.deployments.batching import Columns
from dmm_ray.serving.deployments.calls import to_call
from dmm_ray.serving.errors import DOCUMENTED
from dmm_ray.serving.http.context import Context
from dmm_ray.serving.schemas import ANSWERS, BODIES, AnyBody, request_schema


def install(api: FastAPI, context: Context) -> None:
    """Add the routes to ``api``."""
    for body in BODIES:
        api.post(
            f"/v1/{body.NAME}",
            summary=OPERATIONS[body.NAME].__doc__,
            response_class=JSONResponse,
            responses={200: {"model": ANSWERS[body.NAME]}, **DOCUMENTED},
            openapi_extra={"requestBody": request_schema(body)},
        )(_route(body, context))


def encode(columns: Columns) -> bytes:
    """An answer as JSON; NaN values become null.

    A missing result is null, unless it is the alternative to another result (all features, or only the largest), in
    which case it is left out.
    """
    alternatives = {"features", "indices", "values"}
    plain = {
        k: v.tolist() if isinstance(v, np.ndarray) else v
        for k, v in columns.items()
        if v is not None or k not in alternatives
    }
    return to_json(plain, inf_nan_mode="null")


def _route(kind: type[AnyBody], context: Context) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        body = await context.read_json(request, kind)
        name = context.priors.resolve(body.model)
        call, rows = to_call(body, await context.priors.info(name), context.limits)
        request.state.rows = len(rows["ids"])
        return Response(encode(await context.priors.compute(name, call, rows)), media_type="application/json")

    route.__name__ = kind.NAME
    return route
