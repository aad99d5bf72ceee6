from __future__ import annotations

from dmm_ray.serving.deployments.pace import TURN_S, Pace


def test_a_costly_request_is_cut_into_turns() -> None:
    """101 rows of 1000 steps with 256 probes, 258,000 passes each, on a solver of 1e6 passes a second."""
    pace, left, longest = Pace(max_rows=256), 101, 0.0
    pace.took(1 << 14, 64, (1 << 14) / 1e6)
    while left:
        rows = min(left, pace.rows(258_000, 2000))
        seconds = rows * 258_000 / 1e6
        pace.took(rows * 258_000, 2000, seconds)
        longest, left = max(longest, seconds), left - rows
    assert longest <= TURN_S


def test_small_requests_do_not_shrink_the_batches() -> None:
    pace = Pace(max_rows=256)
    pace.took(100_000, 64, 0.1)
    for _ in range(100):
        pace.took(10, 2, 0.01)  # a thousandth of that speed: all overhead
    assert pace.rows(1000, 64) == 256


def test_it_follows_a_solver_that_becomes_slow() -> None:
    pace = Pace(max_rows=256)
    pace.took(1_000_000, 64, 1.0)
    for _ in range(20):
        pace.took(pace.rows(1000, 64) * 1000, 64, pace.rows(1000, 64) * 1000 / 20_000)
    assert pace.rows(1000, 64) == 20


def test_what_every_call_costs_does_not_split_requests_ever_smaller() -> None:
    """Requests of 62 rows, 192 passes each, on a solver that needs 3 s for a call of any size and 0.07 s per row."""
    pace = Pace(max_rows=256, fixed_s=3.0 / 64)
    for _ in range(20):
        left, total, longest = 62, 0.0, 0.0
        while left:
            rows = min(left, pace.rows(192, 64))
            seconds = 3.0 + 0.07 * rows
            pace.took(rows * 192, 64, seconds)
            left, total, longest = left - rows, total + seconds, max(longest, seconds)
        assert total < 2 * (3.0 + 0.07 * 62)
    assert longest < 2.1 * 3.0


def test_calls_that_are_mostly_fixed_cost_do_not_count() -> None:
    pace = Pace(max_rows=256, fixed_s=0.01)
    pace.took(62 * 192, 64, 0.64 + 1.0)
    before = pace.rows(192, 64)
    for _ in range(50):
        pace.took(192, 64, 0.66)
    assert pace.rows(192, 64) == before
