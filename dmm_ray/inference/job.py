"""A run over units on a Ray Data actor pool: the folder before, during and after it."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any

import numpy as np

from dmm_ray.activations.figures import Progress
from dmm_ray.activations.lock import WriterLock, writer_lock
from dmm_ray.activations.manifest import MANIFEST, SUMMARY, Manifest, read_manifest, read_record
from dmm_ray.activations.pool import map_units
from dmm_ray.activations.resources import Resources, actors_have_fast_bfloat16, plan_resources
from dmm_ray.activations.resume import finish, in_order, prepare, remove_temporary
from dmm_ray.activations.store import file_sizes
from dmm_ray.activations.units import unit_at
from dmm_ray.cluster import ensure_ray
from dmm_ray.config import versions
from dmm_ray.errors import UserError
from dmm_ray.files import absolute, exists, join, make_folder, write_json
from dmm_ray.inference.config import JobConfig
from dmm_ray.inference.engine import Engine, Task
from dmm_ray.inference.operations import Operation
from dmm_ray.inference.outputs import QUANTILES
from dmm_ray.inference.selection import Source
from dmm_ray.precision import Precision, choose_precision

logger = logging.getLogger(__name__)
SHOWN = (1, 5, 25, 50, 75, 95, 99)
"""Percentiles in the summary."""


def run_job(
    config: JobConfig, manifest: Manifest, source: Source, operation: Operation, started: float
) -> str:
    """Write, or finish, the folder ``config.out``; the folder.

    Raises:
        UserError: the folder holds something else or another job's results, or is being written; bad rows.
        CheckFailed: another process took the folder over.
    """
    out = absolute(config.out)
    make_folder(out)
    with writer_lock(out) as lock:
        done = prepare(out, manifest).units
        if len(done) == manifest.units and SUMMARY in file_sizes(out):
            logger.info("%s is complete already: %d units", out, manifest.units)
            return out
        if done:
            logger.info("resuming %s: %d of %d units are done", out, len(done), manifest.units)
        todo = [unit for unit in range(manifest.units) if unit not in done]
        try:
            rows_per_s = run_units(config, out, manifest, source, operation, todo, lock) if todo else None
        finally:
            remove_temporary(out)
        figures = table_figures(out, manifest) if manifest.is_table else finish(out, manifest)
        summary = {
            "figures": {**figures, "rows_per_s": rows_per_s and round(rows_per_s, 1)},
            "inputs": config.model_dump(mode="json"),
            "prior_hash": manifest.derived and manifest.derived.prior_hash,
            "versions": versions(),
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(join(out, SUMMARY), summary)
    return out


def settle_precision(config: JobConfig) -> Precision:
    """The precision of a job: asked for, that of the folder it resumes, or by what the devices are fast in."""
    if config.precision != "auto":
        return config.precision
    out = absolute(config.out)
    if exists(join(out, MANIFEST)):
        derived = read_manifest(out).derived
        return derived.arguments["precision"] if derived else "float32"  # another store; refused later on
    chosen = choose_precision("auto", actors_have_fast_bfloat16(config.cpus_per_actor, config.gpus))
    logger.info("precision: %s, which the devices are fast in (--precision to choose)", chosen)
    return chosen


def run_units(
    config: JobConfig,
    out: str,
    manifest: Manifest,
    source: Source,
    operation: Operation,
    todo: list[int],
    lock: WriterLock,
) -> float:
    """Do the units ``todo``, logging rate and time left; rows per second."""
    ensure_ray()
    resources = plan_resources(config.actors, config.cpus_per_actor, config.gpus, len(todo))
    task = Task(
        out,
        manifest,
        source,
        operation,
        device=resources.device,
        threads=max(1, int(resources.cpus)),
        batch_rows=config.batch_rows,
    )
    _announce(manifest, resources, len(todo))
    progress = Progress(len(todo))
    units = [unit_at(unit, manifest.corpus.documents, manifest.documents_per_unit) for unit in todo]
    with closing(map_units(Engine, (task,), units, resources)) as results:
        for result in results:
            lock.check()
            if "error" in result:
                raise UserError(result["error"])
            progress.add(result["rows"])
    return progress.rows_per_s


def _announce(manifest: Manifest, resources: Resources, todo: int) -> None:
    logger.info(
        "%s: %d units of %d documents at most, layer %d, on %d actors (%s)",
        manifest.verb, todo, manifest.documents_per_unit, manifest.layers[0], resources.actors, resources.device,
    )  # fmt: skip


def table_figures(out: str, manifest: Manifest) -> dict[str, Any]:
    """Sums over the records: rows, documents, bytes, each score's mean, quantiles of the main one.

    Quantiles are those of the units' quantiles, each weighted by its rows.
    """
    totals = {"rows": 0, "documents": 0, "bytes": 0}
    means: dict[str, list[tuple[int, float]]] = {}
    quantiles: dict[str, list[tuple[int, list[float]]]] = {}
    for record in in_order(lambda unit: read_record(out, unit), iter(range(manifest.units))):
        totals["rows"] += record.rows
        totals["documents"] += record.figures["documents"]
        totals["bytes"] += sum(entry.bytes for entry in record.files.values())
        for name, (count, mean) in record.figures["means"].items():
            means.setdefault(name, []).append((count, mean))
        for name, values in record.figures["quantiles"].items():
            quantiles.setdefault(name, []).append((record.rows, values))
    averages = {name: _average(parts) for name, parts in means.items()}
    shown = {name: merge_quantiles(parts) for name, parts in quantiles.items()}
    logger.info(
        "%d rows of %d documents; mean %s", totals["rows"], totals["documents"],
        ", ".join(f"{name} {mean:.4g}" for name, mean in averages.items()) or "of no score",
    )  # fmt: skip
    return {**totals, "units": manifest.units, "means": averages, "quantiles": shown}


def _average(parts: list[tuple[int, float]]) -> float:
    counts, values = zip(*parts, strict=True)
    return float(np.average(values, weights=counts))


def merge_quantiles(parts: list[tuple[int, list[float]]]) -> dict[str, float]:
    """Percentiles of all rows, about, from the number of rows and the 101 quantiles of each part."""
    values = np.concatenate([found for _, found in parts])
    weights = np.repeat([rows for rows, _ in parts], len(QUANTILES)).astype(np.float64)
    order = np.argsort(values, kind="stable")
    share = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return {f"p{p:02d}": float(np.interp(p / 100, share, values[order])) for p in SHOWN}
