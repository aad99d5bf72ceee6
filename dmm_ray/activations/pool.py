"""The units of an extraction on a Ray Data actor pool."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from dmm_ray.activations.actor import Extractor, UnitActor
from dmm_ray.activations.config import ExtractConfig
from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.engine import Loading, Task
from dmm_ray.activations.figures import Progress
from dmm_ray.activations.lock import WriterLock
from dmm_ray.activations.plan import Plan, calibrate, worth_calibrating
from dmm_ray.activations.resources import Resources, plan_resources
from dmm_ray.activations.resume import Done
from dmm_ray.activations.units import Unit, unit_at
from dmm_ray.cluster import call_on_workers, cluster_address, ensure_ray
from dmm_ray.errors import UserError

logger = logging.getLogger(__name__)
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
MAX_BLOCKS = 4096
"""Most Ray Data blocks of a run; with more units, a block holds several."""
UNITS_IN_FLIGHT = 2
"""Per actor: one runs the model while the other is read and tokenised, or written."""


def run_units(
    config: ExtractConfig, out: str, plan: Plan, corpus: Corpus, done: Done, lock: WriterLock
) -> float | None:
    """Extract the units not in ``done``, logging rate and time left; rows per second, or None.

    Raises:
        UserError: too many documents failed, or the store cannot be written.
        CheckFailed: another process took the store over.
    """
    todo = [unit for unit in range(plan.manifest.units) if unit not in done.units]
    if not todo:
        return None
    ensure_ray()
    resources = plan_resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, len(todo))
    loading = Loading(
        batch_tokens=config.batch_tokens or BATCH_TOKENS[resources.device],
        threads=max(1, int(resources.cpus)),
        device=resources.device,
        trust_remote_code=config.trust_remote_code,
        device_map=config.device_map,
        max_memory=config.max_memory,
        offload_folder=config.offload_folder,
    )
    logger.info(
        "extracting %d units of %d documents at most, layers %s, on %d actors (%s)%s",
        len(todo), plan.manifest.documents_per_unit, list(plan.manifest.layers), resources.actors, resources.device,
        expected_time(plan, loading, resources, len(todo)),
    )  # fmt: skip
    failed = done.failed
    progress = Progress(len(todo))
    task = Task(out, plan.manifest, config.max_failed_documents, loading)
    units = [unit_at(unit, corpus.n_documents, plan.manifest.documents_per_unit) for unit in todo]
    with closing(map_units(Extractor, (task, corpus), units, resources)) as results:
        for result in results:
            lock.check()
            if "error" in result:
                raise UserError(result["error"])
            failed += result["failed"]
            if failed > config.max_failed_documents:
                raise UserError(
                    f"text: {failed} documents failed, the last: {result['failure']}; "
                    f"skip more with --max-failed-documents (now {config.max_failed_documents})"
                )
            progress.add(result["rows"])
    return progress.rows_per_s


def expected_time(plan: Plan, loading: Loading, resources: Resources, todo: int) -> str:
    """How long the units to do will take, by a short calibration; empty for a job not much longer than that."""
    if not worth_calibrating(plan.sample, loading.batch_tokens):
        return ""
    if resources.gpus or cluster_address():
        arguments = (plan.manifest, loading, plan.sample.pieces)
        [rate] = call_on_workers(1, calibrate, *arguments, cpus=resources.cpus, gpus=resources.gpus)
    else:
        rate = calibrate(plan.manifest, loading, plan.sample.pieces)
    seconds = plan.sample.tokens * todo / plan.manifest.units / (rate * resources.actors)
    return f"; about {_duration(seconds)} at {rate:,.0f} tokens/s an actor, by a short calibration"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


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
