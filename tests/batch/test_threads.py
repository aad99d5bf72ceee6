"""Threads that read and write must not compute with torch: OpenMP threads of their own slow the one that does."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_cases import LAYER

from dmm_ray.batch.config import DenoiseConfig, ScoreConfig
from dmm_ray.batch.engine import PriorActor, PriorTask, hash_prior
from dmm_ray.batch.inputs import BatchInputs
from dmm_ray.batch.operations import DenoiseOperation, ScoreOperation
from dmm_ray.batch.selection import Selection, StoreRows
from dmm_ray.batch.verbs import store_manifest
from dmm_ray.prior import ActivationPrior
from dmm_ray.store.reader import ActivationStore
from dmm_ray.units.unit import Unit, unit_at

TASKS = "/proc/self/task"


@pytest.mark.skipif(not Path(TASKS).is_dir(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("verb", ["score", "denoise"])
def test_reading_and_writing_start_no_compute_threads(
    store: ActivationStore, prior: str, tmp_path: Path, verb: str
) -> None:
    threads = torch.get_num_threads()
    try:
        engine, unit = make_engine(store, prior, str(tmp_path), verb)

        def work() -> tuple[int, set[int]]:
            """Rows of all documents, and the threads there are before this one ends, without it."""
            rows = engine.work(unit)["rows"]
            (tmp_path / "shards" / "000000.json").unlink()  # to be done again
            return rows, set(map(int, os.listdir(TASKS))) - {threading.get_native_id()}

        counts, there = [], []
        for _ in range(6):
            with ThreadPoolExecutor(1) as apart:
                rows, found = apart.submit(work).result()
                counts.append(rows)
                there.append(found)
        assert counts[0] * store.d > 1 << 15  # torch would divide this among threads
        # Arrow starts threads of its own now and then, a few in all; torch would each time.
        assert any(after <= before for before, after in pairwise(there))
    finally:
        torch.set_num_threads(threads)


def make_engine(store: ActivationStore, prior: str, out: str, verb: str) -> tuple[PriorActor, Unit]:
    """An engine that computes in two threads, and the unit of all documents."""
    loaded, rows = ActivationPrior.from_pretrained(prior), StoreRows(store, LAYER, Selection())
    options: dict[str, Any] = {"prior": prior, "activations": store.uri, "out": out, "rows_per_shard": 10**6}
    operation: ScoreOperation | DenoiseOperation
    if verb == "score":
        score = ScoreConfig(proxy=True, **options)
        operation, config, dtype = ScoreOperation(score, LAYER), score, None
    else:
        denoise = DenoiseConfig(steps=2, **options)
        operation, config, dtype = DenoiseOperation(denoise, LAYER, store.d, "float32"), denoise, "float32"
    inputs = BatchInputs(
        prior, hash_prior(loaded.config, loaded.state_dict()), LAYER, store, rows, store.rows
    )
    manifest = store_manifest(verb, config, inputs, operation, {}, 4, dtype)
    engine = PriorActor(PriorTask(out, manifest, rows, operation, device="cpu", threads=2, batch_rows=None))
    documents = manifest.corpus.documents
    return engine, unit_at(0, documents, documents)
