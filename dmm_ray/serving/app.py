"""The Serve application: an ingress that speaks HTTP, in front of one deployment for each prior."""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from dmm_ray.serving.api import Api
from dmm_ray.serving.config import AppConfig, Limits
from dmm_ray.serving.replica import PriorDeployment

HEALTH_REQUESTS = 64
"""Requests the ingress takes beyond what the priors and their queues hold: health, those read or refused."""


@serve.deployment
@serve.ingress()
class Ingress:
    """Serve's wrapper of the API: one is made in each ingress process."""

    def __init__(self, priors: dict[str, DeploymentHandle], limits: Limits, retry_after_s: float) -> None:
        self._api = Api(priors, limits, retry_after_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The ASGI application; Serve looks for this name."""
        return self._api.build()


def build(config: AppConfig) -> Application:
    """The application that ``config`` describes; nothing is loaded until it is deployed."""
    backpressure = BackpressureConfig(status_code=503, retry_after_s=config.retry_after_s)
    priors = {name: _prior(name, source, config, backpressure) for name, source in config.priors.items()}
    replicas = config.max_replicas or config.replicas
    held = (
        len(priors) * (replicas * config.max_ongoing_requests + config.max_queued_requests) + HEALTH_REQUESTS
    )
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=held,
        max_queued_requests=held,
        backpressure_config=backpressure,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(priors, config.limits, config.retry_after_s)


def _prior(name: str, source: str, config: AppConfig, backpressure: BackpressureConfig) -> Application:
    if config.max_replicas is None:
        size: dict[str, object] = {"num_replicas": config.replicas}
    else:
        size = {"autoscaling_config": {"min_replicas": config.replicas, "max_replicas": config.max_replicas}}
    deployment = PriorDeployment.options(  # type: ignore[attr-defined]
        name=f"prior-{name}",
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=backpressure,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        **size,
    )
    device = "cuda" if config.gpus else "cpu"
    threads = max(1, int(config.cpus))
    return deployment.bind(source, device, threads, config.max_batch_rows, config.batch_wait_ms / 1000)
