"""Measurements a user can repeat: ``python jobs/bench.py [extract | train | prior | serve]``, all of them by default.

Each times its baseline in the same run, in turns, and prints medians: compare ratios, machines are noisy.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bench_extract
import httpx
import torch
from torch import Tensor, nn

from dmm_ray.cluster import quiet
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.network import Denoiser
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.serve import running
from dmm_ray.training.config import TrainConfig, preset_shape
from dmm_ray.training.step import Ema, FlowBatch

BATCH = 1024


def say(line: str) -> None:
    """One line of results."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def medians(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call, run in turns after one warm-up each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def our_step(d: int, z: Tensor) -> Callable[[], object]:
    """The training step as `dmm train` takes it."""
    config = TrainConfig(activations="", out="", batch=BATCH)
    denoiser = Denoiser(d, *preset_shape("auto", d))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    ema, state = Ema(denoiser, 0.05), {"batch": 0}

    def step() -> None:
        data = FlowBatch(config, state["batch"], slice(0, BATCH), z)
        (data.loss(denoiser, True).sum() / BATCH).backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["batch"] += 1
        ema.update(state["batch"])

    return step


def plain_step(d: int, z: Tensor, bf16: bool) -> Callable[[], object]:
    """The same function written plainly: a noise level and a time path for every row, AdamW, an average by loop."""
    denoiser = Denoiser(d, *preset_shape("auto", d))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    average = [p.detach().clone() for p in denoiser.parameters()]

    def step() -> None:
        u, noise = torch.randint(1, 1001, (BATCH,)) / 1000, torch.randn_like(z)
        z_u = (1 - u[:, None]) * z + u[:, None] * noise
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = (denoiser(z_u, u).float() - (noise - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        for a, p in zip(average, denoiser.parameters(), strict=True):
            a.lerp_(p.detach(), 0.001)

    return step


def bench_train() -> None:
    """Samples per second of a training step on the CPU, ours against the plain one."""
    for d in (64, 256):
        z = torch.randn(BATCH, d)
        calls = {
            "ours": our_step(d, z),
            "plain bf16": plain_step(d, z, True),
            "plain float32": plain_step(d, z, False),
        }
        shape = preset_shape("auto", d)
        seconds = medians(calls)
        for name, s in seconds.items():
            ratio = s / seconds["ours"]
            say(f"train d={d} {tuple(shape)} {name:14} {BATCH / s:10,.0f} samples/s   ours is {ratio:.2f}x")


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


BENCHES = {"extract": bench_extraction, "train": bench_train, "prior": bench_prior, "serve": bench_serve}

if __name__ == "__main__":
    quiet()
    unknown = set(sys.argv[1:]) - set(BENCHES)
    if unknown:
        sys.stderr.write(f"bench: no benchmark {sorted(unknown)[0]}; one of {', '.join(BENCHES)}\n")
        sys.exit(2)
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()
