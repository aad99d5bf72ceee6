"""Logging: ``stats.jsonl``, Weights & Biases, Ray's metrics, and a status line on the driver."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dmm_ray.files import absolute, exists, filesystem, is_local, join, read_bytes, write_bytes
from dmm_ray.training.config import TrainConfig

logger = logging.getLogger(__name__)
STATS = "stats.jsonl"
SHOW_EVERY_S = 5.0
GAUGES = {
    "samples": "samples trained on",
    "loss": "flow-matching loss over the last logging interval",
    "samples_per_s": "samples per second",
    "data_wait": "share of the time spent waiting for data",
}


class Tracker:
    """Writes one record per logging interval; only the first worker has a tracker.

    ``stats.jsonl`` is rewritten in full each time, so that it never ends in half a line and works on object stores. A
    resumed run drops the records after its checkpoint and continues from there.

    Args:
        config: the run's configuration.
        samples: seen so far.
        about: additions to the wandb configuration.
        on_ray: set Ray's metrics too; only inside a Ray worker.
    """

    def __init__(self, config: TrainConfig, samples: int, about: dict[str, Any], on_ray: bool) -> None:
        self.path = join(config.out, STATS)
        self.records = [r for r in read_stats(config.out) if r["samples"] <= samples]
        self.run = self._safely(lambda: _wandb_run(config, about))
        self.gauges = _gauges(config) if on_ray else {}

    def log(self, record: dict[str, Any]) -> None:
        """Append a record with at least ``samples``. Raises UserError when the disk is full."""
        self.records.append(record)
        write_bytes(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        if self.run is not None:
            run, numbers = self.run, flat(record)
            self._safely(lambda: run.log(numbers, step=record["samples"]))
        for name, gauge in self.gauges.items():
            gauge.set(record[name])

    def close(self) -> None:
        """End the wandb run."""
        if self.run is not None:
            self._safely(self.run.finish)

    def _safely(self, call: Callable[[], Any]) -> Any:
        """The result of a call to Weights & Biases; None if it fails, and training continues without it."""
        try:
            return call()
        except _tracking_errors() as e:
            reason = " ".join(str(e).split())[:200]
            logger.warning("wandb: %s; the run continues without it, %s has all metrics", reason, self.path)
            self.run = None
            return None


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


def run_id(config: TrainConfig) -> str:
    """The run's id in Weights & Biases, kept on resumption: made of the full path, in characters that it allows."""
    letters = re.sub(r"[^A-Za-z0-9_-]", "-", run_name(config))[:64]
    return f"{letters}-{hashlib.sha256(absolute(config.out).rstrip('/').encode()).hexdigest()[:8]}"


def _tracking_errors() -> tuple[type[Exception], ...]:
    """The errors to expect from Weights & Biases, including its own once it has been imported."""
    wandb = sys.modules.get("wandb")
    return (OSError, RuntimeError, ValueError, *([] if wandb is None else [wandb.Error]))


def _wandb_run(config: TrainConfig, about: dict[str, Any]) -> Any:
    mode: Any = os.environ.get("WANDB_MODE") or config.logging.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb

    return wandb.init(
        project=config.logging.wandb_project,
        id=run_id(config),
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
        """Show the last record and stop."""
        self.stopped.set()
        self.join()
        self._show(last=True)

    def _show(self, last: bool = False) -> None:
        records = read_stats(self.config.out)
        if len(records) > self.seen and (last or time.monotonic() - self.shown >= SHOW_EVERY_S):
            logger.info("%s", status_line(records[-1], self.config.schedule.total_samples))
            self.seen, self.shown = len(records), time.monotonic()


def status_line(record: dict[str, Any], total: int) -> str:
    """``samples 1.2M/5.0M (24%) loss 0.91 ...`` with named columns; losses by level start at the least noise."""
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
        f"workers {record['workers']}",
        f"TFLOP/s {record['tflops']:.3g}" if use is None else f"utilisation {use:.0%}",
        f"wait {record['data_wait']:.0%}",
        f"memory {record['memory_gb']:.1f} GB",
        f"left {(total - done) / max(rate, 1e-9):.0f} s",
    ]
    return "  ".join(parts)
