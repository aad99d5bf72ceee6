"""The flow-matching loss: same noise for all, equal weights for levels, closed form for a Gaussian."""

import numpy as np
import pytest
import torch

from dmm_ray.baselines import Gaussian
from dmm_ray.evaluation.data import EvaluationRows
from dmm_ray.evaluation.fidelity import NoisedRows, squared_errors, summarize


class Recorder:
    """Predicts nothing; remembers what it was asked."""

    n_parameters, seconds = 0, 0.0

    def __init__(self):
        self.rows, self.levels = [], []

    def velocity(self, z, u):
        self.rows.append(z)
        self.levels.append(u)
        return torch.zeros_like(z)


def part(n, d=4, seed=0):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, d)
    return EvaluationRows(z, torch.stack([torch.arange(n) // 10, torch.arange(n) % 10 + 1], dim=1))


@pytest.mark.parametrize("n", [7, 1000, 1001, 2500])
def test_every_level_occurs_equally_often_and_every_row_is_used(n):
    noised = NoisedRows.assign(n, seed=3)
    counts = torch.bincount(noised.level, minlength=1001)
    assert counts[0] == 0
    assert (counts[1:] == -(-n // 1000)).all()
    uses = torch.bincount(noised.row, minlength=n)
    assert uses.max() - uses.min() <= 1
    assert len(set(zip(noised.row.tolist(), noised.use.tolist(), strict=True))) == len(noised.row)


def test_methods_see_the_same_rows_and_a_row_keeps_its_noise_in_any_company():
    rows, noised = part(1500), NoisedRows.assign(1500, seed=0)
    a, b = Recorder(), Recorder()
    squared_errors({"a": a, "b": b}, rows, noised)
    assert torch.equal(torch.cat(a.rows), torch.cat(b.rows))
    swapped = NoisedRows(noised.row.flip(0), noised.use.flip(0), noised.level.flip(0), noised.seed)
    c = Recorder()
    squared_errors({"c": c}, rows, swapped)
    assert torch.allclose(torch.cat(a.rows), torch.cat(c.rows).flip(0), atol=1e-6)
    assert torch.equal(torch.cat(a.levels), torch.cat(c.levels).flip(0))


def test_optimal_gaussian_has_the_loss_of_its_formula():
    values = torch.linspace(0.3, 3, 4, dtype=torch.float64)
    model = Gaussian(torch.zeros(4, dtype=torch.float64), values, torch.eye(4, dtype=torch.float64))
    rows = EvaluationRows(model.sample(20_000), part(20_000).ids)
    noised = NoisedRows.assign(20_000, seed=0)
    errors = squared_errors({"gaussian": model}, rows, noised)["gaussian"]
    found = summarize([(noised, errors)], rows.docs)
    levels = np.arange(1, 1001) / 1000
    expected = np.mean([model.loss(u) for u in levels])
    assert abs(found.overall.mean - expected) < 4 * found.overall.stderr
    assert found.overall.mean == pytest.approx(expected, rel=0.03)
    for k, value in enumerate(found.by_decile):
        assert value == pytest.approx(
            np.mean([model.loss(u) for u in levels[100 * k : 100 * k + 100]]), rel=0.08
        )


def test_masked_rows_do_not_count():
    rows, noised = part(2000), NoisedRows.assign(2000, seed=0)
    errors = np.where(noised.row.numpy() < 1000, 1.0, 50.0)
    mask = np.arange(2000) < 1000
    assert summarize([(noised, errors)], rows.docs, mask).overall.mean == pytest.approx(1.0)
    assert summarize([(noised, errors)], rows.docs, np.zeros(2000, dtype=bool)).overall is None


def test_several_draws_of_the_noise_are_averaged_and_a_document_stays_one_unit():
    rows = part(2000)
    draws = [NoisedRows.assign(2000, seed) for seed in (0, 1)]
    assert not torch.equal(draws[0].row, draws[1].row)
    both = summarize(
        [(noised, np.full(2000, level)) for noised, level in zip(draws, (1.0, 2.0), strict=True)], rows.docs
    )
    assert both.overall.mean == pytest.approx(1.5)
    assert len(both.overall.docs) == 200
