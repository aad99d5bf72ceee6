"""Limits the rows per solver call, so that no call keeps other requests waiting for long."""

from __future__ import annotations

import math

TURN_S = 1.0
"""Target duration of a call in seconds; calls that would take much longer are split, so that requests take turns."""
FIRST_PASSES = 1 << 14
"""Row passes per call before any has been timed: a hundredth of a second on a GPU, seconds on a slow CPU."""
MEMORY = 0.7
"""Weight of the previous estimate when a new call is timed."""


class Pace:
    """Tracks the solver's speed in row passes (forward passes of one row) per second.

    Small calls are slower per row, so what counts is the speed of large ones: those that take at least a quarter of a
    turn.

    Args:
        max_rows: upper bound on rows per call.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._speed: float | None = None

    def rows(self, passes: int) -> int:
        """Maximum rows per call if each row costs ``passes``; at least 1.

        Example:
            >>> pace = Pace(64)
            >>> pace.took(passes=1000, seconds=1.0)
            >>> pace.rows(passes=100), pace.rows(passes=1), pace.rows(passes=5000)
            (10, 64, 1)
        """
        held = FIRST_PASSES if self._speed is None else TURN_S * self._speed
        return max(1, min(self._max_rows, math.floor(held / passes)))

    def took(self, passes: int, seconds: float) -> None:
        """Update the estimate with a call of ``passes`` row passes."""
        speed = passes / max(seconds, 1e-6)
        if self._speed is None or (seconds < TURN_S / 4 and speed > self._speed):
            self._speed = speed
        elif seconds >= TURN_S / 4:
            self._speed = MEMORY * self._speed + (1 - MEMORY) * speed
