"""Clustered standard errors and means over levels, by hand and by simulation."""

import numpy as np
import pytest

from dmm_ray.evaluation.statistics import by_decile, clustered, over_levels


def test_one_row_a_document_is_the_ordinary_standard_error():
    values = np.random.default_rng(0).normal(size=500)
    found = clustered(values, np.arange(500))
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(500))


def test_repeating_every_row_within_its_document_changes_nothing():
    values = np.random.default_rng(0).normal(size=100)
    once = clustered(values, np.arange(100))
    assert clustered(values.repeat(7), np.arange(100).repeat(7)) == pytest.approx(once)


def test_standard_error_covers_the_spread_of_repeated_draws():
    rng = np.random.default_rng(1)
    docs = np.arange(40).repeat(10)

    def draw():
        return clustered(rng.normal(size=40).repeat(10) + rng.normal(size=400), docs)

    found = [draw() for _ in range(400)]
    spread = np.std([e.mean for e in found])
    assert np.mean([e.stderr for e in found]) == pytest.approx(spread, rel=0.1)


def test_nothing_to_average_is_none_and_one_document_has_no_error():
    assert clustered(np.array([]), np.array([])) is None
    assert clustered(np.array([1.0, 3.0]), np.array([5, 5])) == (2.0, None)


def test_levels_have_equal_weights_however_many_rows_they_have():
    decile = np.concatenate([np.arange(10), np.zeros(90, dtype=int)])
    values = np.where(decile == 0, 100.0, 0.0)
    docs = np.arange(100)
    assert over_levels(values, decile, docs).mean == pytest.approx(10.0)
    assert by_decile(values, decile) == [100.0, *[0.0] * 9]


def test_a_decile_without_rows_gives_none():
    values, decile = np.ones(9), np.arange(9)
    assert over_levels(values, decile, decile) is None
    assert by_decile(values, decile)[9] is None
