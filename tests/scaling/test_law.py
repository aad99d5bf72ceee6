"""The law's parameters from points that follow it, and from ones that do not determine it."""

import numpy as np
import pytest

from dmm_ray.errors import UserError
from dmm_ray.scaling.law import fit_law, frontier

COMPUTE = np.geomspace(1e9, 1e14, 9)


@pytest.mark.parametrize("exponent", [0.05, 0.169, 0.7])
@pytest.mark.parametrize("irreducible", [0.0, 0.52])
def test_exact_points_give_their_parameters(exponent, irreducible):
    loss = irreducible + 435 * COMPUTE**-exponent
    found = fit_law(COMPUTE, loss, resamples=100)
    assert found.law.exponent == pytest.approx(exponent, rel=2e-2)
    assert found.law.irreducible == pytest.approx(irreducible, abs=0.02 * loss.max())
    assert found.law.at(COMPUTE) == pytest.approx(loss, rel=1e-4, abs=1e-6 * loss.max())


def test_intervals_cover_the_truth_and_say_what_is_not_known():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(20):
        loss = 0.5 + 20 * COMPUTE**-0.2 + rng.normal(scale=0.002, size=9)
        low, high = fit_law(COMPUTE, loss, resamples=100, seed=trial).intervals["exponent"]
        covered += low <= 0.2 <= high
    assert covered >= 17
    short = fit_law(
        COMPUTE[:4], 0.5 + 20 * COMPUTE[:4] ** -0.2 + rng.normal(scale=0.002, size=4), resamples=200
    )
    low, high = short.intervals["irreducible"]
    assert high - low > 0.1


def test_only_what_no_cheaper_run_beats_is_on_the_frontier():
    compute = np.array([4.0, 1.0, 2.0, 2.0, 3.0])
    loss = np.array([0.5, 1.0, 0.9, 0.8, 0.85])
    assert frontier(compute, loss).tolist() == [1, 3, 0]


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match="only 3 runs are on the frontier"):
        fit_law([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
