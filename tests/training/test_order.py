import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmm_ray.training.order import Order

COUNTS = np.array([7, 0, 5, 9, 3, 6])


def take(order: Order, first: int, n: int) -> list[tuple[int, int]]:
    """(group, row in the window) of samples first .. first + n."""
    rows = []
    for window in order.from_sample(first):
        permutation = order.permutation(window)
        owners = np.repeat(window.groups, order.counts[list(window.groups)])
        offsets = np.concatenate([np.arange(order.counts[g]) for g in window.groups])
        low = max(first - window.start, 0)
        rows += [(int(owners[p]), int(offsets[p])) for p in permutation[low:]]
        if len(rows) >= n:
            return rows[:n]
    raise AssertionError


@given(st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_holds_every_row_once(window_rows, seed):
    order = Order(COUNTS, window_rows, seed)
    everything = {(g, r) for g, n in enumerate(COUNTS) for r in range(n)}
    for epoch in range(3):
        rows = take(order, epoch * 30, 30)
        assert set(rows) == everything


@given(st.integers(1, 40), st.integers(0, 100))
def test_a_resumed_order_goes_on_where_it_stopped(window_rows, first):
    order = Order(COUNTS, window_rows, 3)
    assert take(order, 0, first + 20)[first:] == take(Order(COUNTS, window_rows, 3), first, 20)


def test_epochs_and_seeds_differ():
    order = Order(COUNTS, 100, 0)
    assert take(order, 0, 30) != take(order, 30, 30)
    assert take(order, 0, 30) != take(Order(COUNTS, 100, 1), 0, 30)


@pytest.mark.parametrize("window_rows", [8, 1000])
def test_windows_hold_enough_rows(window_rows):
    windows = list(Order(COUNTS, window_rows, 0).windows(2))
    assert all(w.rows >= min(window_rows, 30) for w in windows[:-1])
    assert sum(w.rows for w in windows) == 30
    assert windows[0].start == 60


@given(st.integers(1, 40), st.integers(0, 60), st.integers(2, 12), st.data())
def test_shares_of_a_window_are_its_permutation_cut_by_batch(window_rows, first, size, data):
    cut = data.draw(st.integers(0, size))
    order = Order(COUNTS, window_rows, 5)
    window = next(order.from_sample(first))
    samples = range(max(first, window.start), window.start + window.rows)
    permutation = order.permutation(window)
    for share in (slice(0, cut), slice(cut, size)):
        expected = [permutation[s - window.start] for s in samples if share.start <= s % size < share.stop]
        assert order.used(window, first, size, share).tolist() == expected
