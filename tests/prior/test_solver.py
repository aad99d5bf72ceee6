import math
from itertools import pairwise

import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.prior.solver import TABLEAUX, Solver

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def test_cosine_grid_covers_and_is_dense_at_both_ends():
    points = Solver().points(0.0, 1.0, 8)
    widths = [b - a for a, b in pairwise(points)]
    assert points[0] == 0
    assert points[-1] == 1
    assert widths == pytest.approx(widths[::-1])
    assert widths[0] < widths[1] < widths[3]
    assert Solver(grid="uniform").points(0.4, 0.0, 2) == pytest.approx([0.4, 0.2, 0.0])
    assert Solver().points(0.3, 0.0, 7)[-1] == 0


@pytest.mark.parametrize(
    ("a", "b", "steps"), [(0.0, 1.0, 0), (-0.1, 1.0, 4), (0.0, 1.5, 4), (0.0, math.nan, 4)]
)
def test_bad_grids(a, b, steps):
    with pytest.raises(UserError, match=r"steps|u:"):
        Solver().points(a, b, steps)


def test_unknown_solvers_are_named():
    with pytest.raises(UserError, match="expected method euler, midpoint, heun, rk4"):
        Solver(method="dopri5")
    with pytest.raises(UserError, match="grid cosine or uniform"):
        Solver(grid="log")


@pytest.mark.parametrize("method", TABLEAUX)
def test_tableaux_are_consistent(method):
    nodes, coefficients, weights = TABLEAUX[method]
    assert sum(weights) == pytest.approx(1)
    assert [sum(row) for row in coefficients] == pytest.approx(list(nodes))


@pytest.mark.parametrize("grid", ["cosine", "uniform"])
@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence_of_state_and_trace(method, grid):
    """z' = z cos u has the divergence cos u: both are known."""
    solver, errors = Solver(method, grid), []
    for steps in (16, 32, 64):
        end, total, _ = solver.integrate_with_trace(
            lambda z, u: z * math.cos(u),
            lambda z, u, k: (
                z * math.cos(u),
                torch.full((1,), math.cos(u), dtype=torch.float64),
                torch.zeros(1),
            ),
            torch.ones(1, 1, dtype=torch.float64),
            solver.points(0, 1, steps),
        )
        errors.append([abs(float(end) - math.exp(math.sin(1))), abs(float(total) - math.sin(1))])
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert math.log2(a / b) > ORDERS[method] - 0.4


@pytest.mark.parametrize("method", ORDERS)
def test_evaluations_are_stages_and_traces_only_where_weighted(method):
    calls = []

    def velocity(z, u):
        calls.append("plain")
        return z

    def traced(z, u, k):
        calls.append(k)
        return z, torch.zeros(1), torch.zeros(1)

    solver = Solver(method)
    solver.integrate_with_trace(velocity, traced, torch.ones(1, 1), solver.points(0, 1, 3))
    assert len(calls) == 3 * solver.stages
    traces = [c for c in calls if c != "plain"]
    assert traces == list(range(3 * sum(w != 0 for w in solver.tableau.weights)))


def test_backward_undoes_forward():
    z = torch.randn(20, 3, dtype=torch.float64)

    def velocity(s, u):
        return torch.sin(s) + u

    for method in ("midpoint", "rk4"):
        solver = Solver(method)
        there = solver.integrate(velocity, z, solver.points(0, 1, 200))
        back = solver.integrate(velocity, there, solver.points(1, 0, 200))
        assert (back - z).abs().max() < 1e-4


def test_variance_of_the_trace_integral():
    solver = Solver()
    points = solver.points(0, 1, 64)
    _, total, variance = solver.integrate_with_trace(
        lambda s, u: s,
        lambda s, u, k: (s, torch.full((4,), 3 * u**2), torch.full((4,), 2.0)),
        torch.zeros(4, 2),
        points,
    )
    assert total.tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    assert variance.tolist() == pytest.approx([2 * sum((b - a) ** 2 for a, b in pairwise(points))] * 4)
