"""Runs units on a Ray Data actor pool."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator, Sequence
from typing import Any

from dmm_ray.failures import Failure
from dmm_ray.ray_session import ray_messages_logged
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.resources import Resources
from dmm_ray.units.unit import Unit

MAX_BLOCKS = 4096
"""Maximum number of Ray Data blocks per run; with more units, a block contains several."""
UNITS_IN_FLIGHT = 2
"""Per actor: one computes while the other is read and prepared, or written out."""
UNIT_RETRIES = 4
"""How many times a unit is retried after its actor process died. Without a limit, a unit that needs more memory than
available would be retried forever."""
LOUD_LOGGERS = (
    "ray.data._internal.progress",  # reports that progress bars are disabled
    # These log exceptions with tracebacks, which the caller saves to a file.
    "ray.data._internal.execution.streaming_executor_state",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
    "ray.data.exceptions",
)


def map_units(
    actor: type[UnitActor], arguments: tuple[Any, ...], units: Sequence[Unit], resources: Resources
) -> Generator[dict[str, Any]]:
    """Yield the small result of each unit, in order of completion, from a pool of ``actor(*arguments)``.

    If the pool itself fails, the last result has an ``error`` and its ``trace``: actors could not be started, or their
    processes died more than ``UNIT_RETRIES`` times on the same unit. Close this generator when an error ends the
    run; the pool keeps processing units as long as it is open.
    """
    import ray

    for name in LOUD_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    items = [unit._asdict() for unit in units]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
    with warnings.catch_warnings():
        # Ray Data has no other way to limit retries yet; upcoming releases of Ray will.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        results = dataset.map_batches(
            actor,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=resources.fitting,
                max_size=resources.actors,
                max_concurrent_calls_per_actor=UNITS_IN_FLIGHT,
            ),
            batch_size=1,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
            ray_remote_args_fn=lambda: {"max_task_retries": UNIT_RETRIES},
        )
    with ray_messages_logged():
        try:
            for row in results.iter_rows():
                yield json.loads(row["result"])
        except ray.exceptions.RayError as e:
            failure = Failure.of(e, actor.memory_options)
            yield {"error": failure.cause, "trace": failure.trace}
