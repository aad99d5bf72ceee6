"""Units on a Ray Data pool of actors."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from typing import Any

from dmm_ray.units.actor import UnitActor
from dmm_ray.units.resources import Resources
from dmm_ray.units.unit import Unit

MAX_BLOCKS = 4096
"""Most Ray Data blocks of a run; with more units, a block holds several."""
UNITS_IN_FLIGHT = 2
"""Per actor: one computes while the other is read and prepared, or written."""


def map_units(
    actor: type[UnitActor], arguments: tuple[Any, ...], units: Sequence[Unit], resources: Resources
) -> Generator[dict[str, Any]]:
    """The small result of each unit, in the order they finish, from a pool of ``actor(*arguments)``.

    Close it when an error ends the run: the pool goes on with units as long as it is open.
    """
    import ray

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
    items = [unit._asdict() for unit in units]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
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
    )
    for row in dataset.iter_rows():
        yield json.loads(row["result"])
