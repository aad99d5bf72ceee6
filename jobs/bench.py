"""Measurements a user can repeat: ``python jobs/bench.py [extract | train | prior | serve]``, all of them by default.

Each times its baseline in the same run, in turns, and prints medians: compare ratios, machines are noisy.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bench_extract
import bench_loader
import bench_train
import httpx
import torch
from timing import medians, say

from dmm_ray.cluster import quiet
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.serve import running

BATCH = 1024


def small_prior() -> ActivationPrior:
    """An untrained prior of the demo's size: its cost is that of a trained one."""
    config = PriorConfig(d=64, layers=(2,), d_model=256, d_mlp=512, n_blocks=6, variance_floor=1e-6)
    return ActivationPrior.untrained(config, torch.zeros(64), torch.ones(64))


def bench_prior() -> None:
    """Rows per second of each operation in process, at the defaults."""
    prior, x = small_prior(), torch.randn(BATCH, 64)
    calls: dict[str, Callable[[], object]] = {
        "log_prob, 2 probes, 32 steps": lambda: prior.log_prob(x),
        "log_prob, exact, 32 steps": lambda: prior.log_prob(x[:128], probes=0),
        "denoise, 10 steps": lambda: prior.denoise(x),
        "sample, 20 steps": lambda: prior.sample(BATCH),
        "encode": lambda: prior.encode(x),
    }
    for name, s in medians(calls, rounds=3).items():
        say(f"prior d=64 {name:30} {(128 if 'exact' in name else BATCH) / s:10,.0f} rows/s")


def bench_serve() -> None:
    """The endpoint against calls in process: latency of 32 rows, rows per second at saturation (JSON)."""
    prior, x = small_prior(), torch.randn(BATCH, 64)
    torch.set_num_threads(1)
    body = json.dumps({"activations": x[:32].tolist(), "steps": 32, "probes": 2}).encode()
    large = json.dumps({"activations": x[:128].tolist(), "steps": 10}).encode()
    with tempfile.TemporaryDirectory() as folder:
        prior.save_pretrained(folder)
        with (
            running(ServeConfig(prior=(folder,), port=0)) as url,
            httpx.Client(base_url=url, timeout=120) as client,
        ):

            def post(path: str, data: bytes) -> None:
                client.post(path, content=data).raise_for_status()

            calls: dict[str, Callable[[], object]] = {
                "in process": lambda: prior.log_prob(x[:32], steps=32, probes=2),
                "HTTP": lambda: post("/v1/log_prob", body),
            }
            latency = medians(calls, rounds=9)
            for name, s in latency.items():
                say(f"serve log_prob of 32 rows, {name:10} p50 {1e3 * s:8.1f} ms")
            alone = medians({"": lambda: prior.denoise(x)}, rounds=3)[""]
            with ThreadPoolExecutor(16) as pool:
                start = time.perf_counter()
                list(pool.map(lambda _: post("/v1/denoise", large), range(96)))
                rate = 96 * 128 / (time.perf_counter() - start)
            say(
                f"serve denoise, 16 clients of 128 rows {rate:,.0f} rows/s, {rate * alone / BATCH:.0%} of in process"
            )


def bench_extraction() -> None:
    """Tokens per second of an extraction against a plain loop, and of the writer."""
    bench_extract.writer(say)
    bench_extract.compare(say)


def bench_training() -> None:
    """Samples per second of a training step against a plain one, its parts, FLOPs; bytes per second of the loader."""
    bench_train.bench(say)
    bench_loader.bench(say)


BENCHES = {"extract": bench_extraction, "train": bench_training, "prior": bench_prior, "serve": bench_serve}

if __name__ == "__main__":
    quiet()
    unknown = set(sys.argv[1:]) - set(BENCHES)
    if unknown:
        sys.stderr.write(f"bench: no benchmark {sorted(unknown)[0]}; one of {', '.join(BENCHES)}\n")
        sys.exit(2)
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()
