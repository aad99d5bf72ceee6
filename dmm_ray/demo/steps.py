"""Progress of the demo: which step of how many is running, and about how much time is left."""

from __future__ import annotations

import logging
import threading
import time
from typing import Self

logger = logging.getLogger(__name__)
STEPS = {"extract": 25.0, "train": 190.0, "evaluate": 90.0, "serve": 25.0}
"""The demo's steps and their approximate seconds on two slow cores; training gets whatever time is left."""
STATUS_EVERY_S = 15.0


class Steps:
    """Context manager that logs the progress of the pipeline at the start of each step and periodically during it.

    Args:
        minutes: total time for all steps; None if no time was given.
    """

    def __init__(self, minutes: float | None) -> None:
        self.total_s = sum(STEPS.values()) if minutes is None else 60 * minutes
        self.known = minutes is not None
        self.started = self.step_started = time.monotonic()
        self.step = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True, name="dmm-steps")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, step: str) -> None:
        """Start the next step."""
        self.step, self.step_started = step, time.monotonic()
        logger.info("%s", self.line())

    def left_for(self, step: str) -> float:
        """Seconds of the total time left for ``step``, reserving those of the steps after it."""
        names = list(STEPS)
        after = sum(STEPS[name] for name in names[names.index(step) + 1 :])
        return self.total_s - (time.monotonic() - self.started) - after

    def left(self) -> float:
        """Approximate seconds until the end, from what the steps usually take and, for training, the total time."""
        names, spent = list(STEPS), time.monotonic() - self.step_started
        after = sum(STEPS[name] for name in names[names.index(self.step) + 1 :])
        usual = self.left_for(self.step) if self.step == "train" else STEPS[self.step] - spent
        if names.index(self.step) < names.index("train"):
            return max(usual, 0.0) + self.total_s - STEPS["extract"]
        return max(usual, 0.0) + after

    def line(self) -> str:
        """``step 2 of 4: train, 0:41 so far, about 4:10 left``."""
        number, spent = list(STEPS).index(self.step) + 1, time.monotonic() - self.started
        left = f", about {_clock(self.left())} left" if self.known else ""
        return f"step {number} of {len(STEPS)}: {self.step}, {_clock(spent)} so far{left}"

    def _show(self) -> None:
        while not self._ended.wait(STATUS_EVERY_S):
            if self.step:
                logger.info("%s", self.line())


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
