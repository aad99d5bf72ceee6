from __future__ import annotations

from dmm_ray.serving.deployments.pace import TURN_S, Pace


def test_a_costly_request_is_cut_into_turns() -> None:
    """101 rows of 1000 steps with 256 probes, 258,000 passes each, on a solver of 1e6 passes a second."""
    pace, left, longest = Pace(max_rows=256), 101, 0.0
    pace.took(1 << 14, (1 << 14) / 1e6)
    while left:
        rows = min(left, pace.rows(258_000))
        seconds = rows * 258_000 / 1e6
        pace.took(rows * 258_000, seconds)
        longest, left = max(longest, seconds), left - rows
    assert longest <= TURN_S


def test_small_requests_do_not_shrink_the_batches() -> None:
    pace = Pace(max_rows=256)
    pace.took(100_000, 0.1)
    for _ in range(100):
        pace.took(10, 0.01)  # a thousandth of that speed: all overhead
    assert pace.rows(1000) == 256


def test_it_follows_a_solver_that_becomes_slow() -> None:
    pace = Pace(max_rows=256)
    pace.took(1_000_000, 1.0)
    for _ in range(20):
        pace.took(pace.rows(1000) * 1000, pace.rows(1000) * 1000 / 20_000)
    assert pace.rows(1000) == 20
