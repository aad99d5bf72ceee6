import math
from itertools import pairwise

import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.prior.solver import cosine_grid, integrate, integrate_with_trace


def test_grid_covers_and_is_dense_at_both_ends():
    grid = cosine_grid(0.0, 1.0, 8)
    widths = [s.stop - s.start for s in grid]
    assert grid[0].start == 0
    assert grid[-1].stop == pytest.approx(1)
    assert all(a.stop == b.start for a, b in pairwise(grid))
    assert widths == pytest.approx(widths[::-1])
    assert widths[0] < widths[1] < widths[3]


@pytest.mark.parametrize(
    ("a", "b", "steps"), [(0.0, 1.0, 0), (-0.1, 1.0, 4), (0.0, 1.5, 4), (0.0, math.nan, 4)]
)
def test_bad_grids(a, b, steps):
    with pytest.raises(UserError, match=r"steps|u:"):
        cosine_grid(a, b, steps)


def test_second_order_on_a_known_equation():
    errors = []
    for steps in (64, 128, 256):
        end = integrate(
            lambda z, u: z * math.cos(u), torch.ones(1, 1, dtype=torch.float64), cosine_grid(0, 1, steps)
        )
        errors.append(abs(float(end) - math.exp(math.sin(1))))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)


def test_backward_undoes_forward():
    z = torch.randn(20, 3, dtype=torch.float64)

    def velocity(s, u):
        return torch.sin(s) + u

    there = integrate(velocity, z, cosine_grid(0, 1, 200))
    back = integrate(velocity, there, cosine_grid(1, 0, 200))
    assert (back - z).abs().max() < 1e-4


def test_trace_integral_and_its_variance():
    z = torch.zeros(4, 2)
    _, total, variance = integrate_with_trace(
        lambda s, u: s,
        lambda s, u, k: (torch.full((4,), 3 * u**2), torch.full((4,), 2.0)),
        z,
        cosine_grid(0, 1, 64),
    )
    assert total.tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    widths = [s.stop - s.start for s in cosine_grid(0, 1, 64)]
    assert variance.tolist() == pytest.approx([2 * sum(w**2 for w in widths)] * 4)
