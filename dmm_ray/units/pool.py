"""Units on a Ray Data pool of actors."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from typing import Any

from dmm_ray.errors import CheckFailed
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.resources import Resources
from dmm_ray.units.unit import Unit

logger = logging.getLogger(__name__)
MAX_BLOCKS = 4096
"""Most Ray Data blocks of a run; with more units, a block holds several."""
UNITS_IN_FLIGHT = 2
"""Per actor: one computes while the other is read and prepared, or written."""


def map_units(
    actor: type[UnitActor], arguments: tuple[Any, ...], units: Sequence[Unit], resources: Resources
) -> Generator[dict[str, Any]]:
    """The small result of each unit, in the order they finish, from a pool of ``actor(*arguments)``.

    Close it when an error ends the run: the pool goes on with units as long as it is open.

    Raises:
        CheckFailed: Ray cannot go on: actors that die again and again, a lost cluster.
    """
    import ray
    from ray.exceptions import RayError

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
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["result"])
    except RayError as e:
        logger.debug("", exc_info=e)
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        memory = "OutOfMemory" in type(e).__name__ or "OOM" in str(e)
        remedy = "; fewer --actors or a smaller batch take less memory" if memory else ""
        raise CheckFailed(
            f"Ray: {type(e).__name__}: {(lines or ['no message'])[-1][:300]}{remedy} (DMM_LOG_LEVEL=DEBUG shows more)"
        ) from e
