"""What a run shows: ``stats.jsonl``, Weights & Biases, and a status line on the driver."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

from dmm_ray.files import exists, filesystem, is_local, join, read_bytes, write_bytes
from dmm_ray.training.config import TrainConfig

logger = logging.getLogger(__name__)
STATS = "stats.jsonl"
SHOW_EVERY_S = 5.0


class Tracker:
    """Writes one record per logging interval; only the first worker has one.

    ``stats.jsonl`` is rewritten whole each time, so that it is never half a line and works on object stores. A
    resumed run drops the records after its checkpoint and goes on.
    """

    def __init__(self, config: TrainConfig, samples: int, about: dict[str, Any]) -> None:
        self.path = join(config.out, STATS)
        self.records = [r for r in read_stats(config.out) if r["samples"] <= samples]
        self.run = _wandb_run(config, about)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record with at least ``samples``."""
        self.records.append(record)
        write_bytes(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        if self.run is not None:
            self.run.log({k: v for k, v in record.items() if v is not None}, step=record["samples"])

    def close(self) -> None:
        """End the wandb run."""
        if self.run is not None:
            self.run.finish()


def read_stats(out: str) -> list[dict[str, Any]]:
    """The records of a run so far, oldest first; empty before the first."""
    path = join(out, STATS)
    return [json.loads(line) for line in read_bytes(path).splitlines()] if exists(path) else []


def _wandb_run(config: TrainConfig, about: dict[str, Any]) -> Any:
    mode: Any = os.environ.get("WANDB_MODE") or config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb

    name = config.out.rstrip("/").split("/")[-1]
    return wandb.init(
        project=config.wandb_project,
        id=name,
        name=name,
        resume="allow",
        mode=mode,
        dir=filesystem(config.out)[1] if is_local(config.out) else None,
        config=config.model_dump(mode="json") | about,
        settings=wandb.Settings(silent=True),
    )


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
    """``samples 1.2M/5.0M (24%) loss 0.91 ...`` with named columns."""
    done, rate = record["samples"], record["samples_per_s"]
    parts = [
        f"samples {done / 1e6:.3f}M/{total / 1e6:.3f}M ({done / total:.0%})",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"samples/s {rate:,.0f}",
        f"left {(total - done) / max(rate, 1e-9):.0f} s",
    ]
    if record.get("validation_loss") is not None:
        parts.insert(2, f"val {record['validation_loss']:.4f}")
    return "  ".join(parts)
