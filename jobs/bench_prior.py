"""Benchmark of a prior's operations, ``python jobs/bench.py prior``: rows and network evaluations per second, and the
share of the machine's matrix product rate that they reach, in float32 and bfloat16, compiled and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import medians, precisions
from torch import Tensor

from dmm_ray.precision import Precision
from dmm_ray.prior import ActivationPrior, PriorConfig

Say = Callable[[str], None]
STEPS, PAIRS = 4, 8


class Case(NamedTuple):
    """A prior's shape and the number of rows per call."""

    d: int
    d_model: int
    d_mlp: int
    n_blocks: int
    rows: int


CPU = (Case(64, 256, 512, 6, 1024), Case(1024, 2048, 4096, 2, 64), Case(4096, 4096, 8192, 1, 16))
CUDA = (Case(64, 256, 512, 6, 65536), Case(2048, 4096, 8192, 6, 4096), Case(4096, 8192, 16384, 6, 1024))
"""The last two have the published sizes for Llama-3.2-1B and Llama-3.1-8B."""
SMALL = (Case(16, 32, 64, 1, 32),)


def bench(say: Say, small: bool = False) -> None:
    """Every operation at three widths; on a CPU the wide networks are shallow. ``small`` only checks that it runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = {
        name: peak(device, getattr(torch, name), 256 if small else 4096 if device == "cuda" else 1024)
        for name in precisions(device)
    }
    say(
        "prior matrix products: "
        + ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in peaks.items())
    )
    for case in SMALL if small else CUDA if device == "cuda" else CPU:
        prior = untrained(case, device)
        measure(say, case, prior, "", peaks)
        if device == "cpu" and case.d > 64:
            say(f"prior d={case.d} compiled: skipped on a CPU, compiling takes minutes")
            continue
        prior.compile(**({"mode": "reduce-overhead"} if device == "cuda" else {}))
        measure(say, case, prior, ", compiled", peaks)


def untrained(case: Case, device: str) -> ActivationPrior:
    """A prior with random weights, which costs the same as a trained one."""
    config = PriorConfig(
        d=case.d,
        layers=(0,),
        d_model=case.d_model,
        d_mlp=case.d_mlp,
        n_blocks=case.n_blocks,
        variance_floor=1e-6,
    )
    with torch.device(device):  # drawing three billion weights on a CPU takes longer than all the rest
        return ActivationPrior.untrained(config, torch.zeros(case.d), torch.ones(case.d))


def measure(say: Say, case: Case, prior: ActivationPrior, how: str, peaks: dict[Precision, float]) -> None:
    """Print one line per operation and number format."""
    x = torch.randn(case.rows, case.d, device=prior.device)
    work = flops(prior)
    for precision in precisions(prior.device.type):
        calls, passes = operations(prior, x, precision)
        for name, seconds in medians(calls, rounds=5).items():
            rate = case.rows / seconds
            share = rate * passes[name] * work / peaks[precision]
            say(
                f"prior d={case.d} {tuple(case[1:4])} {precision}{how:10} {name:18} {rate:11,.0f} rows/s "
                f"{rate * passes[name]:12,.0f} evaluations/s, {share:4.0%} of products"
            )


def operations(
    prior: ActivationPrior, x: Tensor, precision: Precision
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Each operation as a call that waits for its result, and its network passes per row (a tangent counts as one)."""

    def timed(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: call().sum().item()

    calls = {
        "log_prob, 2 probes": timed(lambda: prior.log_prob(x, steps=STEPS, precision=precision).nats),
        "velocity_error": timed(lambda: prior.velocity_error(x, pairs=PAIRS, precision=precision)),
        "denoise": timed(lambda: prior.denoise(x, steps=STEPS, precision=precision)),
        "sample": timed(lambda: prior.sample(len(x), steps=STEPS, precision=precision)),
        "encode, last block": timed(
            lambda: prior.encode(x, block=prior.config.n_blocks - 1, precision=precision)
        ),
    }
    # A midpoint step takes two passes; with a trace, the second also has two tangents.
    passes = dict(zip(calls, (4 * STEPS, PAIRS, 2 * STEPS, 2 * STEPS, 1), strict=True))
    return calls, passes


def flops(prior: ActivationPrior) -> float:
    """FLOPs of one row through the network, excluding the time path, which runs once for all rows."""
    return 2.0 * sum(p.numel() for name, p in prior.denoiser.named_parameters() if "time_" not in name)


def peak(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOPs per second of a square matrix product of size n; float32 is without TF32."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * n**3 / medians({"": lambda: (a @ b)[0, 0].item()}, rounds=9)[""]
