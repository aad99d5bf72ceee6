"""The HTTP API: one ASGI application assembled from groups of routes. Does not need torch."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dmm_ray.protocol import LENGTH_HEADER
from dmm_ray.provenance import versions
from dmm_ray.serving.http import docs_page, json_routes, oip_routes, page, text_routes
from dmm_ray.serving.http.answers import install_handlers
from dmm_ray.serving.http.auth import AccessTokens
from dmm_ray.serving.http.context import Context
from dmm_ray.serving.http.gate import AccessMiddleware, log_access
from dmm_ray.serving.metrics import Answered, HttpMetrics

DESCRIPTION = """Log-probabilities, denoising, samples and meta-neurons of language-model activations.

A row's answer depends on that row, its id, the arguments and the seed alone.
Limits per request: {max_rows} rows, {max_body_bytes} bytes, {max_steps} steps, {max_probes} probes.
Priors: {names}; the first is the default."""


def build_api(context: Context, tokens: AccessTokens | None, cors_origins: tuple[str, ...]) -> FastAPI:
    """The ASGI application that Serve runs.

    Args:
        context: context shared by the routes.
        tokens: accepted tokens; None disables authentication.
        cors_origins: origins whose pages may send requests from a browser.
    """
    description = DESCRIPTION.format(**context.limits.model_dump(), names=", ".join(context.priors.names))
    version = versions()["dmm-ray"]
    api = FastAPI(title="dmm-ray", version=version, description=description, docs_url=None, redoc_url=None)
    install_handlers(api)
    json_routes.install(api, context)
    oip_routes.install(api, context)
    text_routes.install(api, context)
    page.install(api, context)
    docs_page.install(api)
    metrics = HttpMetrics()

    def record(answered: Answered) -> None:
        metrics.record(answered)
        log_access(answered)

    api.add_middleware(AccessMiddleware, tokens=tokens, record=record)
    if cors_origins:  # outside the gate: browsers send preflight requests without a token
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID", LENGTH_HEADER],
            expose_headers=["X-Request-ID", "Retry-After", LENGTH_HEADER],
        )
    return api
