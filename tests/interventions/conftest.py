from __future__ import annotations

import pytest
import torch
from subject.conftest import PROMPT as PROMPT
from subject.conftest import language as language

from dmm_ray.prior import ActivationPrior, PriorConfig


@pytest.fixture(scope="session")
def prior() -> ActivationPrior:
    """An untrained prior of layers 1 and 2 of the tiny Llama, with statistics that differ by layer."""
    config = PriorConfig(
        d=32, layers=(1, 2), subject_layers=4, d_model=32, d_mlp=64, n_blocks=1, variance_floor=1e-6
    )
    mean = torch.stack([torch.full((32,), 0.1), torch.full((32,), 0.5)])
    return ActivationPrior.untrained(config, mean, torch.tensor([[0.25], [0.75]]).expand(2, 32))
