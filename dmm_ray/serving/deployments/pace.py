"""Limits the rows per solver call, so that no call keeps other requests waiting for long."""

from __future__ import annotations

import math

TURN_S = 1.0
"""Target duration of a call in seconds; calls that would take much longer are split, so that requests take turns."""
FIRST_PASSES = 1 << 14
"""Row passes per call before any has been timed: a hundredth of a second on a GPU, seconds on a slow CPU."""
MEMORY = 0.7
"""Weight of the previous estimate when a new call is timed."""
MOSTLY_FIXED = 1.5
"""Calls that take less than this many times their fixed part are not counted."""


class Pace:
    """Tracks the solver's speed in row passes (forward passes of one row) per second.

    A call also costs time that does not depend on its rows, at each network evaluation: reading the weights, the tables
    of a prior's base at a new noise level. Splitting does not save that, so a call gets as many rows as make it at most
    half of the call, however long that takes, and it is left out of the speed. Small calls are slower per row besides,
    so what counts is the speed of large ones: those that take at least a quarter of a turn.

    Args:
        max_rows: upper bound on rows per call.
        fixed_s: seconds per network evaluation of a call that do not depend on its rows.
    """

    def __init__(self, max_rows: int, fixed_s: float = 0.0) -> None:
        self._max_rows = max_rows
        self._fixed_s = fixed_s
        self._speed: float | None = None

    def rows(self, passes: int, evaluations: int) -> int:
        """Maximum rows per call of ``evaluations`` network evaluations if each row costs ``passes``; at least 1.

        Example:
            >>> pace = Pace(64)
            >>> pace.took(passes=1000, evaluations=10, seconds=1.0)
            >>> pace.rows(100, 10), pace.rows(1, 1), pace.rows(5000, 500)
            (10, 64, 1)
        """
        fixed = self._fixed_s * evaluations
        left = max(TURN_S, 2 * fixed) - fixed
        held = FIRST_PASSES if self._speed is None else left * self._speed
        return max(1, min(self._max_rows, math.floor(held / passes)))

    def took(self, passes: int, evaluations: int, seconds: float) -> None:
        """Update the estimate with a call of ``passes`` row passes in ``evaluations`` network evaluations."""
        fixed = self._fixed_s * evaluations
        if seconds < MOSTLY_FIXED * fixed:
            return  # it tells the speed too poorly
        speed = passes / max(seconds - fixed, 1e-6)
        if self._speed is None or (seconds < TURN_S / 4 and speed > self._speed):
            self._speed = speed
        elif seconds >= TURN_S / 4:
            self._speed = MEMORY * self._speed + (1 - MEMORY) * speed
