"""What a run shows: ``stats.jsonl``, Weights & Biases, Ray's metrics, and a status line on the driver."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmm_ray.errors import CheckFailed
from dmm_ray.files import exists, filesystem, is_local, join, read_bytes, write_bytes
from dmm_ray.prior.flow import LEVELS
from dmm_ray.training.checkpoint import room
from dmm_ray.training.config import TrainConfig

logger = logging.getLogger(__name__)
STATS = "stats.jsonl"
SHOW_EVERY_S = 5.0
DECILES = 10
PEAKS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0}
"""Dense bfloat16 TFLOP/s by a part of the device's name."""
GAUGES = {
    "samples": "samples trained on",
    "loss": "flow-matching loss over the last logging interval",
    "samples_per_s": "samples a second",
    "data_wait": "share of the time spent waiting for data",
}


class Tracker:
    """Writes one record per logging interval; only the first worker has one.

    ``stats.jsonl`` is rewritten whole each time, so that it is never half a line and works on object stores. A
    resumed run drops the records after its checkpoint and goes on.

    Args:
        config: of the run.
        samples: seen so far.
        about: more for the wandb configuration.
        on_ray: set Ray's metrics too; inside a Ray worker only.
    """

    def __init__(self, config: TrainConfig, samples: int, about: dict[str, Any], on_ray: bool) -> None:
        self.path = join(config.out, STATS)
        self.records = [r for r in read_stats(config.out) if r["samples"] <= samples]
        self.run = _wandb_run(config, about)
        self.gauges = _gauges(config) if on_ray else {}

    def log(self, record: dict[str, Any]) -> None:
        """Append a record with at least ``samples``. Raises UserError when the disk is full."""
        self.records.append(record)
        with room(self.path):
            write_bytes(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        if self.run is not None:
            self.run.log(flat(record), step=record["samples"])
        for name, gauge in self.gauges.items():
            gauge.set(record[name])

    def close(self) -> None:
        """End the wandb run."""
        if self.run is not None:
            self.run.finish()


def flat(record: dict[str, Any]) -> dict[str, float]:
    """A record as named numbers: ``loss_by_level/0`` and so on, nulls left out."""
    lists = {f"{k}/{i}": x for k, v in record.items() if isinstance(v, list) for i, x in enumerate(v)}
    numbers = {k: v for k, v in record.items() if not isinstance(v, list)} | lists
    return {k: v for k, v in numbers.items() if v is not None}


def read_stats(out: str) -> list[dict[str, Any]]:
    """The records of a run so far, oldest first; empty before the first."""
    path = join(out, STATS)
    return [json.loads(line) for line in read_bytes(path).splitlines()] if exists(path) else []


def run_name(config: TrainConfig) -> str:
    """The output folder's name."""
    return config.out.rstrip("/").split("/")[-1]


def _wandb_run(config: TrainConfig, about: dict[str, Any]) -> Any:
    mode: Any = os.environ.get("WANDB_MODE") or config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb

    return wandb.init(
        project=config.wandb_project,
        id=run_name(config),
        name=run_name(config),
        resume="allow",
        mode=mode,
        dir=filesystem(config.out)[1] if is_local(config.out) else None,
        config=config.model_dump(mode="json") | about,
        settings=wandb.Settings(silent=True),
    )


def _gauges(config: TrainConfig) -> dict[str, Any]:
    """Ray's metrics ``dmm_train_*``, tagged with the run's name."""
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"dmm_train_{name}", about, tag_keys=("run",)) for name, about in GAUGES.items()}
    for gauge in gauges.values():
        gauge.set_default_tags({"run": run_name(config)})
    return gauges


def peak_tflops(config: TrainConfig, device: torch.device) -> float | None:
    """What one device can reach, configured or known; None otherwise."""
    if config.peak_tflops or device.type != "cuda" or config.precision != "bfloat16":
        return config.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def batch_figures(losses: Tensor, u: Tensor, norm: Tensor, first: int, batch: int) -> Tensor:
    """What a worker keeps of one global batch, without waiting for the device.

    Args:
        losses: (n,) of the worker's rows.
        u: (n,) their noise levels.
        norm: of the gradient.
        first: the first row's place in the global batch.
        batch: size of the global batch.

    Returns:
        float32 (24,): the share's part of the mean loss, the norm, per decile of the noise level the sum of the losses
        and their number, and the places of the first and last row whose loss is not finite.
    """
    n = torch.arange(DECILES, device=u.device)
    member = ((u * LEVELS).round().long() - 1)[:, None] * DECILES // LEVELS == n
    place = torch.arange(first, first + len(losses), device=u.device)
    bad = ~losses.isfinite()
    ends = torch.stack([torch.where(bad, place, batch).min(), torch.where(bad, place, -1).max()])
    sums = torch.where(member, losses[:, None], 0.0).sum(0)
    return torch.cat([losses.sum()[None] / batch, norm.detach()[None], sums, member.sum(0), ends])


def means(sums: Tensor) -> dict[str, Any]:
    """``loss``, ``grad_norm`` and ``loss_by_level`` (null where no sample) of an interval's batches (n, 22)."""
    mean, total = sums.double().mean(0), sums.double().sum(0)
    levels, counts = total[2 : 2 + DECILES].tolist(), total[2 + DECILES :].tolist()
    by_level = [x / n if n else None for x, n in zip(levels, counts, strict=True)]
    return {"loss": mean[0].item(), "grad_norm": mean[1].item(), "loss_by_level": by_level}


class Interval:
    """The batches since the last record, whose figures stay on the device until they are asked for.

    Args:
        config: of the run.
        batch: global batches done.
        past: what :meth:`sums` gave when the checkpoint was written that the run goes on from.
        rank: of this worker.
        world: number of workers.
        device: where the figures are.
    """

    def __init__(
        self,
        config: TrainConfig,
        batch: int,
        past: Tensor | None,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.config, self.rank, self.world, self.batch = config, rank, world, batch
        self.past = torch.zeros(0, 2 + 2 * DECILES) if past is None else past
        self.peak = peak_tflops(config, device)
        self.new: list[Tensor] = []
        self.restart(0.0)

    def add(self, figures: Tensor) -> None:
        """Take in :func:`batch_figures` of the next batch."""
        self.new.append(figures)
        self.fresh += 1

    def sums(self) -> Tensor:
        """Figures of every batch since the last record (n, 22) over all workers, on the CPU. Every worker asks at once.

        Raises:
            CheckFailed: a loss or gradient is not finite; the message names the samples.
        """
        if self.new:
            new = torch.stack(self.new)
            sums, ends = new[:, :-2].contiguous(), new[:, -2:]
            if self.world > 1:
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
        """Name the first batch, and the rows in it where some have a loss that is not finite."""
        index = int((~sums.isfinite()).any(1).nonzero()[0])
        ends = ends[index] * torch.tensor([1, -1], device=ends.device)
        if self.world > 1:
            dist.all_reduce(ends, op=dist.ReduceOp.MIN)
        low, high = int(ends[0]), -int(ends[1])
        size, first = self.config.batch, (self.batch + index) * self.config.batch
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
        """Forget the figures: they are recorded."""
        self.past = self.past[:0]

    def restart(self, waited: float) -> None:
        """Begin to measure speed, having ``waited`` so many seconds for data before."""
        self.started, self.waited, self.fresh = time.perf_counter(), waited, 0

    def speed(self, flops_per_batch: float, waited: float) -> dict[str, float]:
        """``samples_per_s``, ``data_wait``, ``tflops`` of all workers and ``utilisation`` if the peak is known."""
        seconds = time.perf_counter() - self.started
        tflops = flops_per_batch * self.fresh / seconds / 1e12
        return {
            "samples_per_s": self.fresh * self.config.batch / seconds,
            "data_wait": (waited - self.waited) / seconds,
            "tflops": tflops,
        } | ({"utilisation": tflops / (self.peak * self.world)} if self.peak else {})


class StatusLines(threading.Thread):
    """Repeats the newest record of ``stats.jsonl`` as a log line every few seconds, on the driver."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(daemon=True, name="dmm-status")
        self.config = config
        self.stopped = threading.Event()
        self.seen, self.shown = len(read_stats(config.out)), 0.0

    def run(self) -> None:
        """Poll until stopped."""
        while not self.stopped.wait(1.0):
            self._show()

    def stop(self) -> None:
        """Show the last lines and end."""
        self.stopped.set()
        self.join()
        self._show(last=True)

    def _show(self, last: bool = False) -> None:
        records = read_stats(self.config.out)
        if len(records) > self.seen and (last or time.monotonic() - self.shown >= SHOW_EVERY_S):
            logger.info("%s", status_line(records[-1], self.config.total_samples))
            self.seen, self.shown = len(records), time.monotonic()


def status_line(record: dict[str, Any], total: int) -> str:
    """``samples 1.2M/5.0M (24%) loss 0.91 ...`` with named columns; losses by level from the least noise."""
    done, rate = record["samples"], record["samples_per_s"]
    validation, use = record["validation_loss"], record.get("utilisation")
    levels = "/".join("-" if x is None else f"{x:.2f}" for x in record["loss_by_level"])
    parts = [
        f"samples {done / 1e6:.3f}M/{total / 1e6:.3f}M ({done / total:.0%})",
        f"loss {record['loss']:.4f}",
        f"by level {levels}",
        *([] if validation is None else [f"val {validation:.4f}"]),
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"samples/s {rate:,.0f}",
        f"TFLOP/s {record['tflops']:.3g}" if use is None else f"utilisation {use:.0%}",
        f"wait {record['data_wait']:.0%}",
        f"memory {record['memory_gb']:.1f} GB",
        f"left {(total - done) / max(rate, 1e-9):.0f} s",
    ]
    return "  ".join(parts)
