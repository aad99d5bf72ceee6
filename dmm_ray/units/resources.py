"""Determines the number and size of actors from the options and the cluster's resources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from dmm_ray.config import Group
from dmm_ray.errors import UserError
from dmm_ray.ray_session import cluster_address, ensure_ray, workers_have_fast_bfloat16


class ActorPool(Group):
    """Options for the processes that do the work."""

    actors: int | None = Field(default=None, ge=1)
    """Processes that each hold a model; defaults to one per GPU, or one per 2 CPUs without GPUs."""
    cpus_per_actor: float | None = Field(default=None, gt=0)
    """CPUs (and torch threads) per actor; defaults to 1 with a GPU, else at most 2."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs per actor, may be fractional, such as 0.5; defaults to 1 if the cluster has any."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs if the cluster has any."""

    @property
    def gpus(self) -> float | None:
        """GPUs requested per actor; None for the default."""
        if self.device == "cpu":
            return 0.0
        return self.gpus_per_actor or (1.0 if self.device == "cuda" else self.gpus_per_actor)


@dataclass(frozen=True)
class Resources:
    """The resolved actor pool."""

    actors: int
    fitting: int
    """Number of actors that fit into the cluster now; autoscaling may add the rest."""
    cpus: float
    gpus: float

    @property
    def device(self) -> str:
        """``cuda`` if an actor has a GPU or a share of one, else ``cpu``."""
        return "cuda" if self.gpus else "cpu"


def plan_resources(pool: ActorPool, units: int) -> Resources:
    """The pool for ``units`` units on the connected cluster.

    Raises:
        UserError: not even one actor fits into a local Ray instance, which cannot scale up.
    """
    import ray

    total = ray.cluster_resources()
    all_cpus, all_gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
    gpus = pool.gpus if pool.gpus is not None else min(1.0, all_gpus)
    cpus = pool.cpus_per_actor or (1.0 if gpus else min(2.0, all_cpus))
    fitting = int(min(all_cpus // cpus, all_gpus // gpus if gpus else float("inf")))
    if fitting < 1 and cluster_address() is None:
        field, asked, there = ("gpus", gpus, all_gpus) if gpus > all_gpus else ("cpus", cpus, all_cpus)
        raise UserError(f"{field}_per_actor: {asked:g} is more than the {there:g} available to Ray here")
    count = max(1, min(pool.actors or fitting, units))
    return Resources(count, max(1, min(fitting, count)), cpus, gpus)


def actors_have_fast_bfloat16(pool: ActorPool) -> bool:
    """Whether the actors' devices are fast in bfloat16. Connects to Ray only if a cluster is configured."""
    if cluster_address() is None:
        gpus = float(torch.cuda.is_available()) if pool.gpus is None else pool.gpus
        return workers_have_fast_bfloat16(0.0, gpus)
    ensure_ray()
    resources = plan_resources(pool.model_copy(update={"actors": 1}), 1)
    return workers_have_fast_bfloat16(resources.cpus, resources.gpus)
