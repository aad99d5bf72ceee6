"""The training step measured, ``python jobs/bench.py train``: ours, compiled and not, against the plain step with a
loader that takes one row at a time; FLOPs and the parts of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import medians, precisions
from torch import Tensor, nn

from dmm_ray.precision import Precision
from dmm_ray.prior.network import Denoiser
from dmm_ray.training.config import TrainConfig, preset_shape
from dmm_ray.training.step import Ema, FlowBatch

BATCH, ROWS = 1024, 100_000


class OurStep:
    """The training step as `dmm train` takes it, on rows that a loader has put in order."""

    def __init__(self, d: int, rows: Tensor, precision: Precision, compiled: bool) -> None:
        self.config = TrainConfig(activations="", out="", batch=BATCH, precision=precision)
        self.denoiser = Denoiser(d, *preset_shape("auto", d))
        self.model = torch.compile(self.denoiser) if compiled else self.denoiser
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4, fused=True)
        self.ema, self.rows, self.batch = Ema(self.denoiser, 0.05), rows, 0
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> None:
        """One step."""
        at = time.perf_counter()

        def part(name: str) -> None:
            nonlocal at
            now = time.perf_counter()
            self.parts[name].append(now - at)
            at = now

        first = self.batch * BATCH % (ROWS - BATCH)
        z = self.rows[first : first + BATCH].float()
        part("load")
        data = FlowBatch(self.config, self.batch, slice(0, BATCH), z)
        part("noise")
        loss = data.loss(self.model, self.config.precision == "bfloat16").sum() / BATCH
        part("forward")
        loss.backward()
        part("backward")
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        part("optimiser")
        self.batch += 1
        self.ema.update(self.batch)
        part("average")


def plain_step(d: int, path: Path, bf16: bool) -> Callable[[], object]:
    """The same function written plainly: a noise level and a time path for every row, AdamW, an average by loop, and
    a loader that takes row by row, in random order, from a memory-mapped file."""
    denoiser = Denoiser(d, *preset_shape("auto", d))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    average = [p.detach().clone() for p in denoiser.parameters()]
    stored = np.memmap(path, dtype=np.float32, mode="r").reshape(ROWS, d)
    rng = np.random.default_rng(0)

    def step() -> None:
        z = torch.stack([torch.from_numpy(stored[i].copy()) for i in rng.integers(0, ROWS, BATCH)])
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


def flops(denoiser: Denoiser, levels: int, batch: int) -> tuple[float, float]:
    """FLOPs of a sample's step: nominal, 6 for each parameter, and really done, the time path once for each level."""
    total = sum(p.numel() for p in denoiser.parameters())
    time_path = sum(p.numel() for name, p in denoiser.named_parameters() if "time_" in name)
    return 6.0 * total, 6.0 * (total - time_path + time_path * levels / batch)


def peak(precision: Precision) -> float:
    """FLOPs per second of a large product on this machine."""
    a, b = (torch.randn(2048, 2048, dtype=getattr(torch, precision)) for _ in range(2))
    return 2 * 2048**3 / medians({"": lambda: a @ b}, rounds=9)[""]


def bench(say: Callable[[str], None]) -> None:
    """Samples per second, FLOPs and parts at two widths, in each precision that this machine is fast in."""
    ceilings = {precision: peak(precision) for precision in precisions()}
    for precision, ceiling in ceilings.items():
        say(f"train {precision} product {ceiling / 1e12:.3f} TFLOP/s")
    for d in (64, 256):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows")
            np.random.default_rng(0).standard_normal((ROWS, d), dtype=np.float32).tofile(path)
            rows = torch.randn(ROWS, d).bfloat16()
            ours = {
                f"ours{how} {precision}": OurStep(d, rows, precision, bool(how))
                for precision in ceilings
                for how in ("", ", compiled")
            }
            plain = {f"plain {p}": plain_step(d, path, p == "bfloat16") for p in ceilings}
            seconds = medians({**ours, **plain}, rounds=15)
        for name, s in seconds.items():
            precision, rate, shares = name.rpartition(" ")[2], BATCH / s, ""
            if name in ours:
                step, ceiling = ours[name], ceilings[precision]
                nominal, done = (
                    rate * each / ceiling
                    for each in flops(step.denoiser, step.config.levels_per_batch, BATCH)
                )
                shares = f", {done:.0%} of the product's FLOPs ({nominal:.0%} nominal)"
            say(
                f"train d={d} {tuple(preset_shape('auto', d))} {name:23} {rate:9,.0f} samples/s, "
                f"plain {precision} {seconds[f'plain {precision}'] / s:.2f}x{shares}"
            )
        for name, step in ours.items():
            parts = ", ".join(
                f"{part} {1e3 * statistics.median(t[1:]):.1f}" for part, t in step.parts.items()
            )
            say(f"train d={d} {name}, ms: {parts}")
