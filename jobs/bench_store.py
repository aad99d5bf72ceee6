"""Benchmark of scoring a store through Ray against a bare loop over the same rows, ``python jobs/bench.py store``.

The time of a long job minus that of a short one gives the rate without the startup of Ray and its actor. The loop reads
row groups and evaluates the prior, in a separate process with the same number of threads, and writes nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_loader import make_store

from dmm_ray.batch.config import ScoreConfig
from dmm_ray.batch.engine import hash_prior
from dmm_ray.batch.inputs import BatchInputs
from dmm_ray.batch.job import PriorJob
from dmm_ray.batch.operations import ScoreOperation
from dmm_ray.batch.selection import Selection, StoreRows
from dmm_ray.batch.verbs import store_manifest
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.ray_session import ensure_ray
from dmm_ray.store.reader import ActivationStore
from dmm_ray.units.job import run_job

LAYER, SHORT = 0, 1 << 15
Say = Callable[[str], None]


def make_prior(d: int) -> ActivationPrior:
    """An untrained prior of the size that `dmm train` chooses for d = 64, which costs the same as a trained one."""
    shape = {"d_model": max(2 * d, 256), "d_mlp": max(4 * d, 512), "n_blocks": 6}
    config = PriorConfig(d=d, layers=(LAYER,), variance_floor=1e-6, **shape)
    return ActivationPrior.untrained(config, torch.zeros(d), torch.ones(d))


def job_seconds(folder: str, prior: ActivationPrior, store: ActivationStore, asked: dict[str, Any]) -> float:
    """Seconds of a complete `dmm score` with one actor on all CPUs, or on a GPU if there is one, without its checks."""
    out = tempfile.mkdtemp(dir=folder)
    config = ScoreConfig(
        prior=f"{folder}/prior", activations=store.uri, out=out, actors=1,
        cpus_per_actor=1 if torch.cuda.is_available() else torch.get_num_threads(), **asked,
    )  # fmt: skip
    rows = StoreRows(store, LAYER, Selection())
    digest = hash_prior(prior.config, prior.state_dict())
    inputs = BatchInputs(config.prior, digest, LAYER, store, rows, store.rows)
    operation = ScoreOperation(config, LAYER)
    manifest = store_manifest("score", config, inputs, operation, {}, 4 * len(operation.columns))
    started = time.monotonic()
    run_job(PriorJob(config, manifest, rows, operation), started)
    return time.monotonic() - started


def loop_seconds(prior: str, store: ActivationStore, asked: dict[str, Any]) -> float:
    """Seconds of reading every row group and evaluating the prior."""
    loaded = ActivationPrior.from_pretrained(prior, device="cuda" if torch.cuda.is_available() else "cpu")
    operation = ScoreOperation(ScoreConfig(prior="", activations="", out="", **asked), LAYER)
    started = time.monotonic()
    for group in store.row_groups(LAYER):
        rows = store.read(LAYER, group)
        ids = torch.from_numpy(np.stack([rows.doc, rows.position.astype(np.int64)], axis=1))
        operation.batch(loaded, rows.activation.to(loaded.device), ids)
    return time.monotonic() - started


def bench(say: Say, times: int = 3, d: int = 64, rounds: int = 3, steps: int = 4) -> None:
    """Rows per second over ``(times - 1) * SHORT`` rows, both ways in turns, medians: likelihood, then cheap score."""
    ensure_ray()
    prior = make_prior(d)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as apart:
        prior.save_pretrained(f"{folder}/prior")
        stores = []
        for name, n in (("short", SHORT), ("long", times * SHORT)):
            Path(folder, name).mkdir()
            stores.append(make_store(f"{folder}/{name}", n, d)[0])
        job_seconds(
            folder, prior, stores[0], {"proxy": True}
        )  # warm-up: the first job also starts parts of Ray
        for label, asked in (("log_prob", {"steps": steps}), ("velocity error", {"proxy": True})):
            job, loop = [], []
            for _ in range(rounds):
                short, long = (job_seconds(folder, prior, store, asked) for store in stores)
                job.append((long - short) / (times - 1))
                loop.append(apart.submit(loop_seconds, f"{folder}/prior", stores[0], asked).result())
            ours, bare = (SHORT / statistics.median(seconds) for seconds in (job, loop))
            say(f"store d={d} {label:15} {ours:10,.0f} rows/s, bare loop {bare:10,.0f}: {ours / bare:.0%}")
