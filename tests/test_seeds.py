"""Seeds of every integer type, everywhere one is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dmm_ray.baselines import Gaussian
from dmm_ray.errors import UserError
from dmm_ray.gaussians import find_clusters, fit_diagonal
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.seeds import numpy_rng, torch_rng


@pytest.mark.parametrize("kind", [np.int32, np.int64, int, np.uint8])
def test_any_integer_is_a_seed(kind: Any) -> None:
    config = PriorConfig(d=8, layers=(1,), d_model=16, d_mlp=32, n_blocks=1, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8), seed=kind(3))
    twin = ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8), seed=3)
    assert torch.equal(prior.sample(2, steps=1, seed=kind(7)), twin.sample(2, steps=1, seed=7))


def test_negative_and_large_seeds_and_what_is_none() -> None:
    config = PriorConfig(d=8, layers=(1,), d_model=16, d_mlp=32, n_blocks=1, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8))
    small = prior.sample(2, steps=1, seed=-3)
    assert torch.equal(small, prior.sample(2, steps=1, seed=np.int32(-3)))
    assert torch.equal(small, prior.sample(2, steps=1, seed=np.uint64(2**64 - 3)))
    assert torch.equal(small, prior.sample(2, steps=1, seed=torch.tensor(-3)))
    for seed in (3.0, None, "3", np.float32(3)):
        with pytest.raises(UserError, match=r"^seed: expected an integer"):
            prior.sample(2, steps=1, seed=seed)


def test_the_generators_are_those_of_the_libraries_and_take_every_integer() -> None:
    assert numpy_rng(5).integers(1 << 60) == np.random.default_rng(5).integers(1 << 60)
    assert torch_rng(5).initial_seed() == 5
    assert torch_rng(-1).initial_seed() == torch_rng(np.uint64(2**64 - 1)).initial_seed()
    assert numpy_rng(-1).integers(1 << 60) == numpy_rng(2**64 - 1).integers(1 << 60)
    for make in (numpy_rng, torch_rng):
        with pytest.raises(UserError, match=r"^seed: expected an integer"):
            make(0.5)


def test_baselines_take_negative_seeds() -> None:
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert Gaussian.fit(z).sample(4, seed=-1).shape == (4, 3)
    assert fit_diagonal(z, find_clusters(z, 2, seed=-1)).sample(4, seed=np.int32(-1)).shape == (4, 3)
