"""Metrics of the batches between two records, kept on the device until they are needed."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmm_ray.errors import CheckFailed
from dmm_ray.prior.flow import NOISE_LEVELS
from dmm_ray.training.config import TrainConfig

DECILES = 10
PEAKS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0}
"""Peak dense bfloat16 TFLOP/s, by a substring of the device's name."""


def peak_tflops(config: TrainConfig, device: torch.device) -> float | None:
    """Peak TFLOP/s of one device if configured or known, else None."""
    if config.logging.peak_tflops or device.type != "cuda" or config.precision != "bfloat16":
        return config.logging.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def batch_metrics(losses: Tensor, u: Tensor, norm: Tensor, first: int, batch: int) -> Tensor:
    """A worker's metrics of one global batch, without waiting for the device.

    Args:
        losses: (n,) of the worker's rows.
        u: (n,) their noise levels.
        norm: norm of the gradient.
        first: the first row's position in the global batch.
        batch: size of the global batch.

    Returns:
        float32 (24,): the share's part of the mean loss, the norm, the sums of the losses and then their counts per
        decile of the noise level, and the positions of the first and last row whose loss is NaN or Inf.
    """
    n = torch.arange(DECILES, device=u.device)
    member = ((u * NOISE_LEVELS).round().long() - 1)[:, None] * DECILES // NOISE_LEVELS == n
    place = torch.arange(first, first + len(losses), device=u.device)
    bad = ~losses.isfinite()
    ends = torch.stack([torch.where(bad, place, batch).min(), torch.where(bad, place, -1).max()])
    sums = torch.where(member, losses[:, None], 0.0).sum(0)
    return torch.cat([losses.sum()[None] / batch, norm.detach()[None], sums, member.sum(0), ends])


def means(sums: Tensor) -> dict[str, Any]:
    """``loss``, ``grad_norm`` and ``loss_by_level`` (null without samples) of an interval's batches (n, 22)."""
    mean, total = sums.double().mean(0), sums.double().sum(0)
    levels, counts = total[2 : 2 + DECILES].tolist(), total[2 + DECILES :].tolist()
    by_level = [x / n if n else None for x, n in zip(levels, counts, strict=True)]
    return {"loss": mean[0].item(), "grad_norm": mean[1].item(), "loss_by_level": by_level}


class MetricsWindow:
    """Metrics of the batches since the last record, which stay on the device until they are needed.

    Args:
        config: the run's configuration.
        batch: global batches done.
        past: the result of :meth:`sums` in the checkpoint that the run resumes from.
        rank: this worker's rank.
        world_size: number of workers.
        device: where the metrics are.
    """

    def __init__(
        self,
        config: TrainConfig,
        batch: int,
        past: Tensor | None,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.rank, self.world_size, self.batch = config, rank, world_size, batch
        self.past = torch.zeros(0, 2 + 2 * DECILES) if past is None else past
        self.peak = peak_tflops(config, device)
        self.new: list[Tensor] = []
        self.restart(0.0)

    def add(self, metrics: Tensor) -> None:
        """Add the :func:`batch_metrics` of the next batch."""
        self.new.append(metrics)
        self.fresh += 1

    def sums(self) -> Tensor:
        """Metrics of every batch since the last record (n, 22) over all workers, on the CPU.

        Collective: every rank must call this.

        Raises:
            CheckFailed: a loss or gradient is NaN or Inf; the message names the samples.
        """
        if self.new:
            new = torch.stack(self.new)
            sums, ends = new[:, :-2].contiguous(), new[:, -2:]
            if self.world_size > 1:
                if self.rank > 0:
                    sums[:, 1] = 0  # every worker has the norm
                dist.all_reduce(sums)
            sums = sums.cpu()
            if not sums.isfinite().all():
                self._fail(sums, ends)
            self.past = torch.cat([self.past, sums])
            self.batch, self.new = self.batch + len(new), []
        return self.past

    def _fail(self, sums: Tensor, ends: Tensor) -> None:
        """Raise, naming the first bad batch and, if losses in it are NaN or Inf, their range of rows."""
        index = int((~sums.isfinite()).any(1).nonzero()[0])
        # The last position is negated so that a single MIN over the workers finds both ends.
        ends = ends[index] * torch.tensor([1, -1], device=ends.device)
        if self.world_size > 1:
            dist.all_reduce(ends, op=dist.ReduceOp.MIN)
        low, high = int(ends[0]), -int(ends[1])
        size, first = self.config.schedule.batch, (self.batch + index) * self.config.schedule.batch
        what = f"gradient's norm is {sums[index, 1]}"
        if low < size:
            what = f"loss is {sums[index, 0]}"
        else:
            low, high = 0, size - 1
        raise CheckFailed(
            f"the {what} between samples {first + low} and {first + high + 1}; lower --lr or train in float32; "
            f"the last checkpoint in {self.config.out} is kept"
        )

    def clear(self) -> None:
        """Drop the metrics, which have been recorded."""
        self.past = self.past[:0]

    def restart(self, waited: float) -> None:
        """Start measuring speed; ``waited`` are the seconds spent waiting for data so far."""
        self.started, self.waited, self.fresh = time.perf_counter(), waited, 0

    def speed(self, flops_per_batch: float, waited: float) -> dict[str, float]:
        """``samples_per_s``, ``data_wait``, ``tflops`` of all workers and ``utilisation`` if the peak is known."""
        seconds = time.perf_counter() - self.started
        tflops = flops_per_batch * self.fresh / seconds / 1e12
        return {
            "samples_per_s": self.fresh * self.config.schedule.batch / seconds,
            "data_wait": (waited - self.waited) / seconds,
            "tflops": tflops,
        } | ({"utilisation": tflops / (self.peak * self.world_size)} if self.peak else {})
