"""Clustered standard errors and means over levels, by hand and by simulation."""

import numpy as np
import pytest

from dmm_ray.evaluation.statistics import by_decile, clustered, over_levels, relative


def test_one_row_a_document_is_the_ordinary_standard_error():
    values = np.random.default_rng(0).normal(size=500)
    found = clustered(values, np.arange(500))
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(500))


def test_repeating_every_row_within_its_document_changes_nothing():
    values = np.random.default_rng(0).normal(size=100)
    once, again = clustered(values, np.arange(100)), clustered(values.repeat(7), np.arange(100).repeat(7))
    assert (again.mean, again.stderr) == pytest.approx((once.mean, once.stderr))


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
    lone = clustered(np.array([1.0, 3.0]), np.array([5, 5]))
    assert (lone.mean, lone.stderr) == (2.0, None)
    assert relative(lone, lone) == (0.0, None)
    assert relative(None, lone) is None


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


def test_intervals_of_a_ratio_cover_it_and_pairing_narrows_them():
    """Two methods whose errors share a part for each document: the ratio is known far better than either mean."""
    rng = np.random.default_rng(2)
    docs = np.arange(60).repeat(5)
    covered, paired, apart = 0, [], []
    for _ in range(400):
        shared = rng.gamma(4, size=60).repeat(5)
        a, b = (clustered(level * shared + rng.normal(scale=0.2, size=300), docs) for level in (0.7, 1.0))
        low, high = relative(a, b).interval
        covered += low <= -0.3 <= high
        paired.append(high - low)
        apart.append(2 * 1.96 * np.hypot(a.stderr / a.mean, b.stderr / b.mean) * 0.7)
    assert 0.91 < covered / 400 < 0.98
    assert np.mean(paired) < 0.3 * np.mean(apart)


def test_a_ratio_of_other_documents_is_refused():
    a, b = (clustered(np.ones(4), np.arange(4) + first) for first in (0, 1))
    with pytest.raises(ValueError, match="same documents"):
        relative(a, b)
