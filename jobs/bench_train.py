"""Benchmark of the training step, ``python jobs/bench.py train``: ours, compiled and not, against a plain step with a
loader that fetches one row at a time; FLOPs and the parts of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timing import medians, precisions
from torch import Tensor, nn

from dmm_ray.precision import Precision
from dmm_ray.prior.network import Denoiser
from dmm_ray.training.config import TrainConfig, preset_shape
from dmm_ray.training.step import Ema, FlowBatch


class Case(NamedTuple):
    """A network for rows of width ``d`` and its training batch."""

    d: int
    shape: tuple[int, int, int]
    """d_model, d_mlp, number of blocks."""
    batch: int
    rows: int


CPU = tuple(Case(d, preset_shape("auto", d), 1024, 100_000) for d in (64, 256))
CUDA = (Case(64, preset_shape("auto", 64), 16384, 1_000_000), Case(2048, (4096, 8192, 6), 4096, 100_000))
"""The last one has the published size for Llama-3.2-1B and the published batch."""


class OurStep:
    """The training step of `dmm train`, on rows that a loader has put in order.

    Attributes:
        apart: whether to wait for the device after each part of a step and record its time in ``parts``.
    """

    def __init__(self, case: Case, rows: Tensor, precision: Precision, compiled: bool, device: str) -> None:
        self.config = TrainConfig(activations="", out="", batch=case.batch, precision=precision)
        self.denoiser = Denoiser(case.d, *case.shape).to(device)
        self.model = torch.compile(self.denoiser) if compiled else self.denoiser
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4, fused=True)
        self.ema, self.rows, self.batch = Ema(self.denoiser, 0.05), rows, 0
        self.device, self.apart = device, False
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> None:
        """Take one step."""
        at, batch = time.perf_counter(), self.config.schedule.batch

        def part(name: str) -> None:
            nonlocal at
            if not self.apart:
                return
            wait(self.device)
            now = time.perf_counter()
            self.parts[name].append(now - at)
            at = now

        first = self.batch * batch % (len(self.rows) - batch)
        z = self.rows[first : first + batch].to(self.device, non_blocking=True).float()
        part("load")
        data = FlowBatch(self.config, self.batch, slice(0, batch), z)
        part("noise")
        loss = data.loss(self.model, self.config.precision == "bfloat16").sum() / batch
        part("forward")
        loss.backward()
        part("backward")
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        part("clip")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        part("optimiser")
        self.batch += 1
        self.ema.update(self.batch)
        part("average")
        wait(self.device)


def wait(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def plain_step(case: Case, path: Path, bf16: bool, device: str) -> Callable[[], object]:
    """The same step written plainly: a noise level and a time path for every row, unfused AdamW, an average by loop,
    and a loader that fetches row by row, in random order, from a memory-mapped file."""
    denoiser = Denoiser(case.d, *case.shape).to(device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    average = [p.detach().clone() for p in denoiser.parameters()]
    stored = np.memmap(path, dtype=np.float32, mode="r").reshape(case.rows, case.d)
    rng = np.random.default_rng(0)

    def step() -> None:
        rows = [torch.from_numpy(stored[i].copy()) for i in rng.integers(0, case.rows, case.batch)]
        z = torch.stack(rows).to(device)
        u, noise = torch.randint(1, 1001, (case.batch,), device=device) / 1000, torch.randn_like(z)
        z_u = (1 - u[:, None]) * z + u[:, None] * noise
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = (denoiser(z_u, u).float() - (noise - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        for a, p in zip(average, denoiser.parameters(), strict=True):
            a.lerp_(p.detach(), 0.001)
        wait(device)

    return step


def flops(denoiser: Denoiser, levels: int, batch: int) -> tuple[float, float]:
    """FLOPs per sample of a step: nominal, 6 per parameter, and actual, with the time path run once per level."""
    total = sum(p.numel() for p in denoiser.parameters())
    time_path = sum(p.numel() for name, p in denoiser.named_parameters() if "time_" in name)
    return 6.0 * total, 6.0 * (total - time_path + time_path * levels / batch)


def peak(precision: Precision, device: str) -> float:
    """FLOPs per second of a large matrix product on this machine."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=getattr(torch, precision), device=device) for _ in range(2))
    return 2 * n**3 / medians({"": lambda: (a @ b)[0, 0].item()}, rounds=9)[""]


def bench(say: Callable[[str], None]) -> None:
    """Samples per second, FLOPs and parts of a step at two widths, in each precision that is fast on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings = {precision: peak(precision, device) for precision in precisions(device)}
    for precision, ceiling in ceilings.items():
        say(f"train {precision} product {ceiling / 1e12:.3f} TFLOP/s")
    for case in CUDA if device == "cuda" else CPU:
        for precision, ceiling in ceilings.items():
            compare(say, case, precision, ceiling, device)


def compare(
    say: Callable[[str], None], case: Case, precision: Precision, ceiling: float, device: str
) -> None:
    """Time ours, compiled and not, and the plain step, in turns; then the parts of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        np.random.default_rng(0).standard_normal((case.rows, case.d), dtype=np.float32).tofile(path)
        rows = torch.randn(case.rows, case.d).bfloat16()
        rows = rows.pin_memory() if device == "cuda" else rows
        ours = {f"ours{how}": OurStep(case, rows, precision, bool(how), device) for how in ("", ", compiled")}
        plain = plain_step(case, path, precision == "bfloat16", device)
        seconds = medians({**ours, "plain": plain}, rounds=15)
    for name, s in seconds.items():
        rate, shares = case.batch / s, ""
        if name in ours:
            found = flops(ours[name].denoiser, ours[name].config.schedule.levels_per_batch, case.batch)
            nominal, done = (rate * each / ceiling for each in found)
            shares = f", {done:.0%} of the product's FLOPs ({nominal:.0%} nominal)"
        say(
            f"train d={case.d} {tuple(case.shape)} batch {case.batch} {precision} {name:14} "
            f"{rate:9,.0f} samples/s, plain {seconds['plain'] / s:.2f}x{shares}"
        )
    for name, step in ours.items():
        step.apart = True
        for _ in range(8):
            step()
        parts = ", ".join(f"{part} {1e3 * statistics.median(t[1:]):.1f}" for part, t in step.parts.items())
        say(f"train d={case.d} {precision} {name}, ms: {parts}")
