"""How many actors of what size an extraction gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmm_ray.cluster import cluster_address, ensure_ray, workers_have_fast_bfloat16
from dmm_ray.errors import UserError


@dataclass(frozen=True)
class Resources:
    """The actor pool."""

    actors: int
    fitting: int
    """Actors that fit into the cluster as it is; autoscaling may bring the rest."""
    cpus: float
    gpus: float

    @property
    def device(self) -> str:
        """``cuda`` where an actor has a GPU, or a share of one."""
        return "cuda" if self.gpus else "cpu"


def plan_resources(actors: int | None, cpus: float | None, gpus: float | None, units: int) -> Resources:
    """The pool for ``units`` units on the connected cluster; None means its default.

    Raises:
        UserError: not one actor fits into a local Ray, which cannot grow.
    """
    import ray

    total = ray.cluster_resources()
    all_cpus, all_gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
    gpus = gpus if gpus is not None else min(1.0, all_gpus)
    cpus = cpus if cpus is not None else (1.0 if gpus else min(2.0, all_cpus))
    fitting = int(min(all_cpus // cpus, all_gpus // gpus if gpus else float("inf")))
    if fitting < 1 and cluster_address() is None:
        field, asked, there = ("gpus", gpus, all_gpus) if gpus > all_gpus else ("cpus", cpus, all_cpus)
        raise UserError(f"{field}_per_actor: {asked:g} is more than the {there:g} that Ray has here")
    count = max(1, min(actors or fitting, units))
    return Resources(count, max(1, min(fitting, count)), cpus, gpus)


def actors_have_fast_bfloat16(cpus: float | None, gpus: float | None) -> bool:
    """Whether the devices that actors of this size get are fast in bfloat16. Connects to a cluster only to ask it.

    Args:
        cpus: of each actor; None for the default.
        gpus: of each actor; None for the default, which takes GPUs where there are some.
    """
    if cluster_address() is None:
        return workers_have_fast_bfloat16(0.0, float(torch.cuda.is_available()) if gpus is None else gpus)
    ensure_ray()
    resources = plan_resources(1, cpus, gpus, 1)
    return workers_have_fast_bfloat16(resources.cpus, resources.gpus)
