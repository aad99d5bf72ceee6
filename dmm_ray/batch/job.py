"""An operation of a prior as a job of units: its actors, its precision, and the summary of a table."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dmm_ray.batch.config import JobConfig
from dmm_ray.batch.engine import PriorActor, PriorTask
from dmm_ray.batch.operations import BatchOperation
from dmm_ray.batch.outputs import QUANTILES
from dmm_ray.batch.selection import RowSource
from dmm_ray.config import identity_as_saved
from dmm_ray.files import absolute, exists, join
from dmm_ray.parallel import in_order
from dmm_ray.precision import Precision, choose_precision
from dmm_ray.store.manifest import MANIFEST, Manifest, read_manifest, read_record
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.job import Job
from dmm_ray.units.resources import Resources, actors_have_fast_bfloat16
from dmm_ray.units.resume import finish

logger = logging.getLogger(__name__)
SHOWN = (1, 5, 25, 50, 75, 95, 99)
"""Percentiles in the summary."""


class PriorJob(Job[JobConfig]):
    """An operation of a prior on rows.

    Args:
        config: the configuration of the command.
        manifest: describes the contents of the folder.
        source: the rows.
        operation: the operation to apply to them.
    """

    def __init__(
        self, config: JobConfig, manifest: Manifest, source: RowSource, operation: BatchOperation
    ) -> None:
        super().__init__(absolute(config.out), manifest, config.pool, config)
        self.source, self.operation = source, operation

    def actor(self, resources: Resources, units: int) -> tuple[type[UnitActor], tuple[Any, ...]]:
        """Actors that each hold the prior."""
        manifest = self.manifest
        task = PriorTask(
            self.out,
            manifest,
            self.source,
            self.operation,
            device=resources.device,
            threads=max(1, int(resources.cpus)),
            batch_rows=self.config.batch_rows,
        )
        logger.info(
            "%s: %d units of up to %d documents, layer %d, on %d actors (%s)",
            manifest.verb, units, manifest.documents_per_unit, manifest.layers[0], resources.actors,
            resources.device,
        )  # fmt: skip
        return PriorActor, (task,)

    def finish(self) -> dict[str, Any]:
        """Summarise a table, or write the moments of activations."""
        total = table_figures if self.manifest.is_table else finish
        return total(self.out, self.manifest)

    @property
    def provenance(self) -> dict[str, Any]:
        """The hash of the prior."""
        return {"prior_hash": self.manifest.derived and self.manifest.derived.prior_hash}


def recorded_arguments(out: str) -> dict[str, Any] | None:
    """The arguments of the results in a folder, by option; None if it contains no results of a prior."""
    out = absolute(out)
    derived = read_manifest(out).derived if exists(join(out, MANIFEST)) else None
    return derived.arguments if derived else None


def arguments_of(config: JobConfig) -> dict[str, Any]:
    """What determines a job's results besides prior and rows, in the form recorded by the folder to resume."""
    recorded = recorded_arguments(config.out)
    return config.identity() if recorded is None else identity_as_saved(config, recorded)


def settle_precision(config: JobConfig) -> Precision:
    """The precision of a job: as requested, else as in the folder to resume, else by device."""
    if config.precision != "auto":
        return config.precision
    recorded = recorded_arguments(config.out)
    if recorded is not None:
        precision: Precision = recorded["precision"]
        return precision
    chosen = choose_precision("auto", actors_have_fast_bfloat16(config.pool))
    logger.info("precision: %s, which the devices are fast in (--precision to choose)", chosen)
    return chosen


def table_figures(out: str, manifest: Manifest) -> dict[str, Any]:
    """Totals over the records: rows, documents, bytes, the mean of each score, and quantiles of the main one.

    Quantiles are computed from the units' quantiles, weighted by their rows.
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
        ", ".join(f"{name} {mean:.4g}" for name, mean in averages.items()) or "n/a",
    )  # fmt: skip
    return {**totals, "units": manifest.units, "means": averages, "quantiles": shown}


def _average(parts: list[tuple[int, float]]) -> float:
    counts, values = zip(*parts, strict=True)
    return float(np.average(values, weights=counts))


def merge_quantiles(parts: list[tuple[int, list[float]]]) -> dict[str, float]:
    """Approximate percentiles of all rows, from the number of rows and the 101 quantiles of each part."""
    values = np.concatenate([found for _, found in parts])
    weights = np.repeat([rows for rows, _ in parts], len(QUANTILES)).astype(np.float64)
    order = np.argsort(values, kind="stable")
    share = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return {f"p{p:02d}": float(np.interp(p / 100, share, values[order])) for p in SHOWN}
