"""Requests to a run from outside: signals to the driver, stop requests and preemption notices to the workers."""

from __future__ import annotations

import logging
import signal
import threading
import time
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from dmm_ray.files import exists

logger = logging.getLogger(__name__)
LOOK_S, ASK_S, AGREE_BATCHES = 1.0, 5.0, 4


class RunSignal(Enum):
    """What a run should do after a batch."""

    CONTINUE = "go on"
    CHECKPOINT = "save a checkpoint and go on"
    STOP = "save a checkpoint and end"


class InterruptHandler:
    """A context that, in the main thread, notes SIGINT and SIGTERM; a second one interrupts immediately."""

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        logger.warning("interrupted: saving a checkpoint; interrupt again to exit immediately")


class RaySignals:
    """Stop requests from the driver and preemption notices from Ray, agreed on by all workers.

    The first worker checks periodically. Its findings are all-reduced on the CPU, starting after one batch and read a
    few batches later, so that no worker waits for them and no device is synchronised.
    """

    def __init__(self, request: str, rank: int, world_size: int) -> None:
        self.request, self.rank, self.preempted = request, rank, list[str]()
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None
        self.seen, self.work = torch.zeros(2), None
        self.looked = self.asked = 0.0

    def __call__(self, batches: int) -> RunSignal:
        """What to do after this many batches."""
        if batches % AGREE_BATCHES:
            return RunSignal.CONTINUE
        if self.work is not None:
            self.work.wait()
        stop, ask = self.seen.tolist()
        self._look()
        if stop:
            return RunSignal.STOP
        return RunSignal.CHECKPOINT if ask and self._preempted() else RunSignal.CONTINUE

    def _look(self) -> None:
        """Start the next all-reduce: (stop, time to ask Ray)."""
        now, stop, ask = time.monotonic(), False, False
        if self.rank == 0 and now - self.looked >= LOOK_S:
            self.looked, stop = now, exists(self.request)
        if self.rank == 0 and now - self.asked >= ASK_S:
            self.asked, ask = now, True
        self.seen = torch.tensor([float(stop), float(ask)])
        if self.group is not None:
            self.work = dist.all_reduce(self.seen, group=self.group, async_op=True)

    def _preempted(self) -> bool:
        """Whether Ray announces the preemption of further nodes. Collective, as in Ray: every rank must call this."""
        import ray.train

        info = ray.train.get_preemption_info()
        nodes = info.preempted_node_ids if info else []
        new, self.preempted = nodes != self.preempted and bool(nodes), nodes
        return new
