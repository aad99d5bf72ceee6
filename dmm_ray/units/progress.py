"""Progress log lines while units are processed."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)
LOG_SECONDS = 10.0


class Progress:
    """Logs units done, rows per second and the time left, at most every 10 seconds.

    The time left is estimated from the end of the first unit, so that it excludes the startup time of the actors.
    """

    def __init__(self, units: int) -> None:
        self.units, self.done, self.rows = units, 0, 0
        self.started = self.first = self.logged = time.monotonic()

    def add(self, rows: int) -> None:
        """Add a finished unit."""
        self.done, self.rows, now = self.done + 1, self.rows + rows, time.monotonic()
        if self.done == 1:
            self.first = now
        elif now - self.logged >= LOG_SECONDS:
            self.logged = now
            left = int((now - self.first) / (self.done - 1) * (self.units - self.done))
            logger.info(
                "unit %d/%d  %s rows  %.0f rows/s  ETA %d:%02d",
                self.done, self.units, f"{self.rows:,}", self.rows_per_s, left // 60, left % 60,
            )  # fmt: skip

    @property
    def rows_per_s(self) -> float:
        """Rows per second since the start."""
        return self.rows / max(time.monotonic() - self.started, 1e-9)
