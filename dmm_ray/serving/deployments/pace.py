"""How many rows a solver call may have, so that it does not keep the others waiting."""

from __future__ import annotations

import math

TURN_S = 1.0
"""A call that takes much longer than this is cut, so that requests take turns."""
FIRST_PASSES = 1 << 14
"""Row passes of a call before any was timed: a hundredth of a second on a GPU, seconds on a slow CPU."""
MEMORY = 0.7
"""Weight of what was known when another call has been timed."""


class Pace:
    """Follows the solver's speed, in row passes per second: a row's forward passes, one after the other.

    Small calls are slower by row, so the speed that counts is that of large ones: those within a factor of four of
    what a turn holds.

    Args:
        max_rows: most rows of a call in any case.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._speed: float | None = None

    def rows(self, passes: int) -> int:
        """Most rows of a call whose rows cost ``passes`` each; at least 1.

        Example:
            >>> pace = Pace(64)
            >>> pace.took(passes=1000, seconds=1.0)
            >>> pace.rows(passes=100), pace.rows(passes=1), pace.rows(passes=5000)
            (10, 64, 1)
        """
        held = FIRST_PASSES if self._speed is None else TURN_S * self._speed
        return max(1, min(self._max_rows, math.floor(held / passes)))

    def took(self, passes: int, seconds: float) -> None:
        """Record the duration of a call of ``passes`` row passes."""
        speed = passes / max(seconds, 1e-6)
        if self._speed is None or (seconds < TURN_S / 4 and speed > self._speed):
            self._speed = speed
        elif seconds >= TURN_S / 4:
            self._speed = MEMORY * self._speed + (1 - MEMORY) * speed
