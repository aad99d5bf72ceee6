"""A store's folder before and after processing: existing units, what can be resumed, and cleanup."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmm_ray.config import refuse_other
from dmm_ray.errors import UserError
from dmm_ray.files import TEMPORARY, filesystem, join, plain_errors, write_json
from dmm_ray.parallel import THREADS, in_order
from dmm_ray.provenance import SUMMARY
from dmm_ray.store.figures import Figures
from dmm_ray.store.manifest import (
    MANIFEST,
    STATISTICS,
    Manifest,
    Record,
    moments_name,
    read_manifest,
    read_moments,
    read_record,
    record_name,
    write_moments,
)
from dmm_ray.store.moments import Moments
from dmm_ray.store.reader import file_sizes, length_problem
from dmm_ray.units.lock import LOCK

logger = logging.getLogger(__name__)
AHEAD_BYTES = 32 << 20
"""Approximate amount of moments to read ahead of merging."""


class Done(NamedTuple):
    """The finished units, and the number of documents that failed in them."""

    units: set[int]
    failed: int


def units_ahead(moments: Mapping[int, Moments]) -> int:
    """For how many units to read ahead moments the size of these, by layer: few if they include covariances."""
    n_bytes = sum(array.nbytes for part in moments.values() for array in part.arrays("").values())
    return max(1, min(4 * THREADS, AHEAD_BYTES // n_bytes))


def check_target(out: str) -> None:
    """Raise UserError if ``out`` is a file, or a folder that contains something other than a store."""
    fs, path = filesystem(out)
    with plain_errors(out):
        if fs.isfile(path):
            raise UserError(f"out: {out} is a file; choose another --out")
        if not fs.isdir(path):
            return
        entries = {name.strip("/") for name in fs.ls(path, detail=False)} - {
            path.strip("/")  # some object stores list a marker for the folder itself
        }
    names = {name.rsplit("/", 1)[-1] for name in entries} - {LOCK}
    if names and MANIFEST not in names:
        raise UserError(
            f"out: {out} is not a store but contains other files ({sorted(names)[0]}); choose another --out"
        )


def prepare(out: str, manifest: Manifest) -> Done:
    """Write the manifest or compare it with the existing one; remove leftover files and damaged units.

    Raises:
        UserError: the folder has finished units of a different configuration; the message names the options.
    """
    sizes = file_sizes(out)
    there = read_manifest(out) if MANIFEST in sizes else None
    records = {}
    for unit, record in in_order(
        lambda u: (u, _record(out, u, sizes, there)), iter(range(there.units if there else 0))
    ):
        if record is not None:
            records[unit] = len(record.failed)
    same = there is not None and there.config_hash == manifest.config_hash
    if there and not same and (records or SUMMARY in sizes):
        _refuse_other(out, there, manifest)
    kept = set(map(record_name, records)) if same else set()
    fs, path = filesystem(out)
    for name in sizes:
        # Removing its record is enough to have a unit redone, which overwrites its other files.
        broken = name.startswith("shards/") and name.endswith(".json") and name not in kept
        if TEMPORARY in name or broken or (not same and "/" in name):
            with plain_errors(out):
                fs.rm_file(join(path, name))
    if not same:
        write_json(join(out, MANIFEST), manifest.model_dump(mode="json"))
    return Done(set(records) if same else set(), sum(records.values()) if same else 0)


def _record(out: str, unit: int, sizes: dict[str, int], manifest: Manifest | None) -> Record | None:
    """The record of a unit if it is finished and all its files have their recorded lengths, else None."""
    if record_name(unit) not in sizes:
        return None
    try:
        record = read_record(out, unit)
    except UserError as e:
        logger.warning("%s; redoing its unit", e)
        return None
    if manifest is None or record.config_hash != manifest.config_hash:
        logger.warning("%s: unit %d has a different configuration; redoing it", out, unit)
        return None
    if problem := length_problem(record, sizes):
        logger.warning("%s: %s; redoing its unit", out, problem)
        return None
    return record


def _refuse_other(out: str, there: Manifest, manifest: Manifest) -> None:
    """Raise UserError naming the options that differ from those that the store at ``out`` was made with."""
    theirs, ours = there.identity(), manifest.identity()
    # The size of units often follows from other options, so it is only named if nothing else differs.
    cut = {"rows_per_shard": theirs.pop("rows_per_shard")}, {"rows_per_shard": ours.pop("rows_per_shard")}
    refuse_other(out, theirs, ours)
    refuse_other(out, *cut)


def finish(out: str, manifest: Manifest) -> dict[str, Any]:
    """Merge the moments in shard order and write them; returns totals over all records.

    Raises:
        UserError: the corpus did not yield a single row.
    """
    total = {layer: Moments.empty(manifest.d, manifest.covariance) for layer in manifest.layers}
    figures = Figures(manifest)

    def read(unit: int) -> tuple[Record, dict[int, Moments]]:
        return read_record(out, unit), read_moments(out, moments_name(unit), manifest.layers)

    for record, part in in_order(read, iter(range(manifest.units)), units_ahead(total)):
        figures.add(record)
        total = {layer: total[layer].merge(part[layer]) for layer in manifest.layers}
    if figures.rows == 0:
        raise UserError(
            f"text: {', '.join(manifest.text.uris)}: no document has any tokens to keep; "
            "see --keep-first, --min-position and --max-position"
        )
    write_moments(out, STATISTICS, total)
    remove_temporary(out)
    figures.massive = {layer: moments.massive() for layer, moments in total.items()}
    logger.info("%s", figures.line())
    return figures.summary()


def remove_temporary(out: str) -> None:
    """Delete partial files left behind by a killed process."""
    fs, path = filesystem(out)
    for name in file_sizes(out):
        if TEMPORARY in name:
            with plain_errors(out):
                fs.rm_file(join(path, name))
