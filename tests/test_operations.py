"""The table of operations, and all that is made of it: signatures, bodies, solver stages."""

from __future__ import annotations

import inspect

import pytest
import torch

from dmm_ray.client import Client
from dmm_ray.operations import OPERATIONS, STAGES, OperationName
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.ask import ask
from dmm_ray.prior.solver import TABLEAUX
from dmm_ray.serving.schemas import ANSWERS, BODIES

EVERYWHERE = {"layer", "ids", "seed", "precision"}
SUBJECT = {"self", "x", "n"}


def arguments(method: object) -> dict[str, object]:
    """Names and defaults."""
    found = inspect.signature(method).parameters  # type: ignore[arg-type]
    return {name: one.default for name, one in found.items() if name not in SUBJECT}


@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures_are_the_table_s(name: OperationName) -> None:
    table = {key: field.default for key, field in OPERATIONS[name].model_fields.items()}
    remote, local = arguments(getattr(Client, name)), arguments(getattr(ActivationPrior, name))
    assert {key: value for key, value in remote.items() if key not in EVERYWHERE} == table
    solver = {"method", "grid"} & set(table)
    # In Python a Solver holds the two; exact_limit insists on what an endpoint never allows.
    expected = {key: value for key, value in table.items() if key not in solver} | (
        {"solver": None} if solver else {}
    )
    assert {k: v for k, v in local.items() if k not in EVERYWHERE | {"exact_limit"}} == expected
    assert set(local) & set(remote) >= EVERYWHERE


def test_bodies_and_answers_are_the_table_s() -> None:
    for body in BODIES:
        kind = OPERATIONS[body.NAME]
        known = {"model", "ids", "layer", "seed", "precision"} | (
            {"n"} if body.NAME == "sample" else {"activations"}
        )
        assert set(body.model_fields) == known | set(kind.model_fields)
        for name, field in kind.model_fields.items():
            assert body.model_fields[name].default == field.default
        assert set(ANSWERS[body.NAME].model_fields) - {"evaluations"} == set(kind.RESULTS)


def test_stages_are_the_solver_s() -> None:
    assert {name: len(tableau.nodes) for name, tableau in TABLEAUX.items()} == STAGES


@pytest.fixture(scope="module")
def prior() -> ActivationPrior:
    config = PriorConfig(
        d=6, layers=(2,), subject_layers=4, d_model=16, d_mlp=8, n_blocks=2, variance_floor=1e-6
    )
    return ActivationPrior.untrained(config, torch.zeros(1, 6), torch.ones(1, 6))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_found_is_what_the_table_says(prior: ActivationPrior, name: OperationName) -> None:
    x, ids = (
        torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 1], [0, 2], [5, 1]]),
    )
    kind = OPERATIONS[name]
    told = kind().model_dump()
    found = ask(prior, name, 3 if name == "sample" else x, ids, told)
    assert set(found) == set(kind.RESULTS)
    widths = {"one": (), "d": (6,), "features": (16,), "top": (4,)}
    for column, result in kind.RESULTS.items():
        value = found[column]
        assert value is not None or result.nullable
        if value is not None:
            assert value.shape == (3, *widths[result.per_row])
            assert value.dtype == (torch.int64 if result.integer else torch.float32)


def test_the_largest_units(prior: ActivationPrior) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for block in (None, 1):
        units = prior.encode(x, block=block, noises=2)
        top = prior.encode(x, block=block, noises=2, top=4)
        expected = units.sort(dim=1, descending=True, stable=True)
        assert torch.equal(top.indices, expected.indices[:, :4])
        assert torch.equal(top.values, expected.values[:, :4])


def test_of_equal_units_the_first_are_taken() -> None:
    from dmm_ray.prior.top import TopUnits

    found = TopUnits.of(torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 9.0]]), 3)
    assert found.indices.tolist() == [[1, 2, 4], [4, 0, 1]]
    assert found.values.tolist() == [[2.0, 2.0, 2.0], [9.0, 3.0, 3.0]]


def test_work_is_counted_in_passes() -> None:
    def passes(name: OperationName, **told: object) -> int:
        return OPERATIONS[name](**told).passes(64)

    assert passes("log_prob", steps=10, probes=2) == 40
    assert passes("log_prob", steps=10, probes=0, method="rk4") == 40 * 33
    assert passes("denoise", steps=10) == 20
    assert passes("denoise", steps=10, mode="mean") == 1
    assert passes("denoise", steps=10, distance=0.3) == 140
    assert passes("encode", noises=3) == 3
    assert passes("velocity_error", pairs=5) == 5


def test_a_distance_in_place_of_a_level(prior: ActivationPrior) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    levels = prior.level_for_distance(x, 0.5, steps=4)
    assert torch.equal(prior.denoise(x, distance=0.5, steps=4), prior.denoise(x, levels, steps=4))
