from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from subject.conftest import make_model as make_model

from dmm_ray.interventions import LanguageModel
from dmm_ray.prior import ActivationPrior, PriorConfig

Make = Callable[[str], Path]
PROMPT = "the cat sat on"


@pytest.fixture(scope="session")
def language(tiny_subject: Path) -> LanguageModel:
    """The tiny Llama with its head."""
    return LanguageModel.load(str(tiny_subject))


@pytest.fixture(scope="session")
def prior() -> ActivationPrior:
    """An untrained prior of layers 1 and 2 of the tiny Llama, with statistics that differ by layer."""
    config = PriorConfig(
        d=32, layers=(1, 2), subject_layers=4, d_model=32, d_mlp=64, n_blocks=1, variance_floor=1e-6
    )
    mean = torch.stack([torch.full((32,), 0.1), torch.full((32,), 0.5)])
    return ActivationPrior.untrained(config, mean, torch.tensor([[0.25], [0.75]]).expand(2, 32))
