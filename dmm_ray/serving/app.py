"""The Serve application: an HTTP ingress in front of one deployment per prior and one for the subject."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from dmm_ray.serving.config import AppConfig
from dmm_ray.serving.deployments.handles import DeploymentClient, Priors
from dmm_ray.serving.deployments.prior import PriorDeployment
from dmm_ray.serving.deployments.subject import SubjectDeployment
from dmm_ray.serving.http.api import build_api
from dmm_ray.serving.http.auth import AccessTokens, tokens_of
from dmm_ray.serving.http.context import Context

HEALTH_REQUESTS = 64
"""Requests that the ingress accepts beyond the capacity of the deployments and their queues: health checks, and
requests being read or refused."""
DRAIN_POLL_S = 0.5


@serve.deployment
@serve.ingress()
class Ingress:
    """Serve's wrapper of the API, one instance per ingress replica.

    Args:
        priors: a handle to each prior's deployment, by name; the first is the default.
        subject: a handle to the language model's deployment, if there is one.
        config: the application's configuration.
        tokens: the arguments of ``AccessTokens``; None disables authentication.

    Raises:
        UserError: the token file is missing or empty.
    """

    def __init__(
        self,
        priors: dict[str, DeploymentHandle],
        subject: DeploymentHandle | None,
        config: AppConfig,
        tokens: tuple[tuple[bytes, ...], str | None] | None,
    ) -> None:
        self._config = config
        self._tokens = None if tokens is None else AccessTokens(*tokens)
        self._context = Context(
            Priors({name: self._backend(handle, "prior") for name, handle in priors.items()}),
            None if subject is None else self._backend(subject, "language model"),
            config.limits,
            config.body_timeout_s,
            config.retry_after_s,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The ASGI application; Serve looks up this method by name."""
        return build_api(self._context, self._tokens, self._config.cors_origins)

    def _backend(self, handle: DeploymentHandle, what: str) -> DeploymentClient:
        return DeploymentClient(handle, what, self._config.timeout_s, self._config.retry_after_s)


def build(config: AppConfig) -> Application:
    """The application described by ``config``; nothing is loaded until it is deployed.

    Raises:
        UserError: tokens are required but none are given.
    """
    tokens = tokens_of(config)
    priors = {name: _prior(name, source, config) for name, source in config.priors.items()}
    subject = _subject(config)
    replicas = config.max_replicas or config.replicas
    held = len(priors) * (replicas * config.max_ongoing_requests + config.max_queued_requests)
    if subject is not None:
        held += config.subject_replicas * config.max_ongoing_texts + config.max_queued_requests
    held += HEALTH_REQUESTS
    options = _options(config, held, held) | {"num_replicas": config.ingress_replicas}
    ingress = Ingress.options(**options, ray_actor_options={"num_cpus": 0})  # type: ignore[attr-defined]
    return ingress.bind(priors, subject, config, tokens)


def _options(config: AppConfig, ongoing: int, queued: int) -> dict[str, Any]:
    """Options common to all deployments."""
    return {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": queued,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=config.retry_after_s),
        "graceful_shutdown_timeout_s": config.drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
    }


def _prior(name: str, source: str, config: AppConfig) -> Application:
    options = _options(config, config.max_ongoing_requests, config.max_queued_requests)
    if config.max_replicas is None:
        options["num_replicas"] = config.replicas
    else:
        options["autoscaling_config"] = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
    deployment = PriorDeployment.options(  # type: ignore[attr-defined]
        **options,
        name=f"prior-{name}",
        user_config={
            "source": source
        },  # changing only this reconfigures running replicas instead of replacing them
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
    )
    return deployment.bind(
        "cuda" if config.gpus else "cpu",
        config.precision,
        max(1, int(config.cpus)),
        config.max_batch_rows,
        config.batch_wait_ms / 1000,
        config.hung_s,
    )


def _subject(config: AppConfig) -> Application | None:
    if config.subject is None:
        return None
    model, directions = config.subject
    deployment = SubjectDeployment.options(  # type: ignore[attr-defined]
        **_options(config, config.max_ongoing_texts, config.max_queued_requests),
        name="subject",
        num_replicas=config.subject_replicas,
        ray_actor_options={"num_cpus": config.subject_cpus, "num_gpus": config.subject_gpus},
    )
    device = "cuda" if config.subject_gpus else "cpu"
    threads = max(1, int(config.subject_cpus))
    formats = (config.precision, config.compute_dtype)
    return deployment.bind(
        model, directions, config.priors, device, formats, threads, config.trust_remote_code
    )
