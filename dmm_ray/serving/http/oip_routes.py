"""``/v2/*``: health, metadata and inference according to the Open Inference Protocol (KServe V2)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from dmm_ray.operations import OPERATIONS, OperationName
from dmm_ray.protocol import LENGTH_HEADER
from dmm_ray.provenance import versions
from dmm_ray.serving.deployments.calls import array_call
from dmm_ray.serving.errors import DOCUMENTED, RequestError
from dmm_ray.serving.http.answers import failure
from dmm_ray.serving.http.context import Context
from dmm_ray.serving.http.oip import InferBody, metadata, read_inference, write_answer
from dmm_ray.serving.schemas import ROWS, request_schema

UNREADY: dict[int | str, dict[str, Any]] = {503: DOCUMENTED[503]}
UNKNOWN: dict[int | str, dict[str, Any]] = {404: DOCUMENTED[404], **UNREADY}
VERSION = "1"
"""The only version: new weights replace the old ones."""
EXAMPLE = {
    "inputs": [{"name": "activations", "shape": [2, 4], "datatype": "FP32", "data": ROWS}],
    "parameters": {"steps": 32, "probes": 2, "seed": 0},
    "outputs": [{"name": "nats"}],
}


def install(api: FastAPI, context: Context) -> None:
    """Add the routes to ``api``."""
    routes = _Routes(context)
    router = APIRouter(prefix="/v2")
    router.get("", summary="Server metadata")(routes.server)
    router.get("/health/live", summary="Is the HTTP ingress up?")(routes.live)
    router.get("/health/ready", summary="Are all priors (and the language model) ready?", responses=UNREADY)(
        routes.ready
    )
    for at in ("/models/{model}", "/models/{model}/versions/{version}"):
        router.get(at, summary="The tensors of a model", responses=UNKNOWN)(routes.model)
        router.get(f"{at}/ready", summary="Is a model ready?", responses=UNKNOWN)(routes.model_ready)
        router.post(
            f"{at}/infer",
            summary="Inference with a model: log_prob, denoise, ..., or NAME.log_prob of another prior",
            responses=DOCUMENTED,
            openapi_extra={"requestBody": _documented_body()},
        )(routes.infer)
    api.include_router(router)


class _Routes:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def server(self) -> dict[str, Any]:
        """Server metadata."""
        return {"name": "dmm-ray", "version": versions()["dmm-ray"], "extensions": ["binary_tensor_data"]}

    async def live(self) -> dict[str, bool]:
        """Liveness."""
        return {"live": True}

    async def ready(self) -> Response:
        """Readiness of all priors and the language model."""
        if waiting := await self._context.waiting_for():
            return self._unready(", ".join(waiting))
        return JSONResponse({"ready": True})

    async def model(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """Metadata of a model."""
        name, operation = self._find(model, version)
        return metadata(model, operation, (await self._context.priors.info(name)).d)

    async def model_ready(self, model: str, version: str = VERSION) -> Response:
        """Readiness of a model."""
        name, _ = self._find(model, version)
        if not await self._context.priors.is_up(name):
            return self._unready(name)
        return JSONResponse({"name": model, "ready": True})

    async def infer(self, model: str, request: Request, version: str = VERSION) -> Response:
        """Inference."""
        name, operation = self._find(model, version)
        context = self._context
        body = await context.read(request)
        asked = read_inference(operation, body, request.headers.get(LENGTH_HEADER))
        info = await context.priors.info(name)
        call, rows = array_call(
            asked.arguments, asked.n, asked.activations, asked.ids, info, context.limits, asked.levels
        )
        request.state.rows = asked.n
        answer, length = write_answer(model, asked, await context.priors.compute(name, call, rows))
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, headers={LENGTH_HEADER: str(length)}, media_type="application/octet-stream")

    def _find(self, model: str, version: str) -> tuple[str, OperationName]:
        """The prior and the operation denoted by a model's name. Raises RequestError 404."""
        if version != VERSION:
            raise RequestError(404, f"version: every model has version {VERSION} only (got {version[:80]!r})")
        name, _, wanted = model.rpartition(".")
        for operation in OPERATIONS:
            if operation == wanted:
                return self._context.priors.resolve(name or None), operation
        raise RequestError(404, f"model: no such model; available: {', '.join(OPERATIONS)}, or NAME.log_prob")

    def _unready(self, what: str) -> JSONResponse:
        return failure(503, f"not ready: {what}", self._context.retry_after_s)


def _documented_body() -> dict[str, Any]:
    body = request_schema(InferBody)
    body["content"]["application/json"]["schema"]["examples"] = [EXAMPLE]
    body["content"]["application/octet-stream"] = {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": f"The JSON, whose length is given by {LENGTH_HEADER}, then the tensors that have a "
            "binary_data_size, in the same order, little-endian.",
        }
    }
    return body
