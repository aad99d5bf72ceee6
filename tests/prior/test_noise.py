import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmm_ray.prior.noise import normal, philox, rademacher, row_ids


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox((torch.tensor([counter]),) * 4, (key, key))
    assert tuple(int(w) for w in words) == expected


def test_philox_known_answer_of_pi():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = philox(tuple(torch.tensor([c]) for c in counter), (0xA4093822, 0x299F31D0))
    assert tuple(int(w) for w in words) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@given(
    st.integers(-(2**70), 2**70), st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=6, unique=True)
)
def test_a_row_depends_on_seed_and_id_alone(seed, ids):
    together = normal(seed, torch.tensor(ids), 7)
    for i, one in enumerate(ids):
        assert torch.equal(normal(seed, torch.tensor([one]), 7)[0], together[i])
    assert len(torch.unique(together, dim=0)) == len(ids)


def test_moments_and_independence():
    x = normal(3, torch.arange(50_000), 8).double()
    assert x.mean(0).abs().max() < 0.02
    assert (x.T @ x / len(x) - torch.eye(8)).abs().max() < 0.02
    assert ((x**4).mean() - 3).abs() < 0.05
    other = normal(3, torch.arange(50_000), 8, stream=1).double()
    assert (x * other).mean().abs() < 0.01


def test_rademacher_signs():
    signs = rademacher(0, torch.arange(2000), 200)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.01
    assert (signs[:, 0] * signs[:, 130]).mean().abs() < 0.1


def test_pairs_name_rows():
    pairs = np.array([[4, 1], [4, 2], [5, 1]])
    noise = normal(0, row_ids(pairs, 3), 4)
    assert len(torch.unique(noise, dim=0)) == 3
    assert torch.equal(normal(0, torch.tensor([[4, 2]]), 4)[0], noise[1])


@pytest.mark.parametrize("ids", [np.arange(3), np.zeros((4, 3), int), np.ones(4)])
def test_wrong_ids_are_named(ids):
    with pytest.raises(ValueError, match="ids: expected 4 integers"):
        row_ids(ids, 4)
