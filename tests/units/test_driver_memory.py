"""What the driver keeps in memory, for a store of 1e10 rows: 40,000 units of 250,000."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmm_ray.store.figures import Figures
from dmm_ray.store.manifest import (
    FileEntry,
    Manifest,
    Record,
    moments_name,
    read_manifest,
    record_name,
    shard_name,
    write_moments,
)
from dmm_ray.store.moments import Moments
from dmm_ray.units.progress import Progress
from dmm_ray.units.resume import finish, prepare
from dmm_ray.units.unit import unit_at

UNITS = 40_000
MB = 1e6


def peak(function: Callable[[], Any]) -> float:
    """The most that Python and numpy hold while ``function`` runs and of its result, in bytes."""
    tracemalloc.start()
    try:
        kept = function()
        assert kept is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def manifest(tiny_store: Path) -> Manifest:
    return read_manifest(str(tiny_store)).model_copy(update={"units": UNITS}).sealed()


def record(unit: int, manifest: Manifest, moments_bytes: int) -> Record:
    """Of a finished unit whose shards hold one byte."""
    layers = manifest.layers
    counts = dict.fromkeys(map(str, layers), 0)
    files = {shard_name(layer, unit): FileEntry(bytes=1, sha256="0" * 64) for layer in layers}
    files[moments_name(unit)] = FileEntry(bytes=moments_bytes, sha256="0" * 64)
    return Record(
        config_hash=manifest.config_hash, unit=unit, first_document=500 * unit, documents=500, failed=(), long=0,
        tokens=250_000, padding=0, rows=250_000, excluded=0, nonfinite=counts, outliers=counts, files=files,
    )  # fmt: skip


def write_units(store: Path, manifest: Manifest, units: int) -> None:
    """Finished units; their moments are links to one file."""
    for folder in ("shards", *(f"layer_{layer:02d}" for layer in manifest.layers)):
        (store / folder).mkdir(parents=True, exist_ok=True)
    d = manifest.d
    products = np.eye(d) if manifest.covariance else None
    part = Moments(250_000, np.zeros(d), np.ones(d), products)
    size = write_moments(str(store), "moments", dict.fromkeys(manifest.layers, part)).bytes
    for unit in range(units):
        found = record(unit, manifest, size)
        for name in found.files:
            if name == moments_name(unit):
                os.link(store / "moments", store / name)
            else:
                (store / name).write_bytes(b"x")
        (store / record_name(unit)).write_text(found.model_dump_json())
    (store / "moments").unlink()


def test_a_resume(manifest: Manifest, tmp_path: Path) -> None:
    """Measured with 1,000 finished units; it grows in proportion."""
    store, units = tmp_path / "store", 1000
    write_units(store, manifest, units)
    (store / "manifest.json").write_text(manifest.model_dump_json())
    assert len(prepare(str(store), manifest).units) == units
    assert peak(lambda: prepare(str(store), manifest)) / units * UNITS < 60 * MB


def test_the_plan_and_the_counts(manifest: Manifest) -> None:
    """Measured with 4,000 units; it grows in proportion."""
    n = 4000

    def count() -> tuple[Any, ...]:
        units = [unit_at(unit, 500 * n, 500)._asdict() for unit in range(n)]
        progress, figures, done = Progress(n), Figures(manifest), set[int]()
        for unit in range(n):
            found = record(unit, manifest, 1)
            progress.add(found.rows)
            figures.add(found)
            done.add(unit)
        return units, progress, figures, done

    assert peak(count) / n * UNITS < 100 * MB


def test_the_merge(manifest: Manifest, tmp_path: Path) -> None:
    """Covariances of 2 MB in each of two layers of 200 units: 800 MB in all."""
    store = tmp_path / "store"
    large = manifest.model_copy(update={"units": 200, "d": 512, "covariance": True})
    write_units(store, large, large.units)
    assert peak(lambda: finish(str(store), large)) < 100 * MB
