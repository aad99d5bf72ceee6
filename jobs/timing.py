"""Shared by the benchmarks: printing, and medians of calls in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from dmm_ray.precision import Precision, has_fast_bfloat16


def say(line: str) -> None:
    """Print one line of results."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def medians(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call; the calls are run in turns after one warm-up each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def precisions(device: str = "cpu") -> tuple[Precision, ...]:
    """The precisions worth measuring; a device without fast bfloat16 is about a hundred times slower in it."""
    return ("float32", "bfloat16") if has_fast_bfloat16(device) else ("float32",)
