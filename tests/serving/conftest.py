from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dmm_ray.prior import ActivationPrior, PriorConfig

D = 16


def save_prior(folder: Path, layers: tuple[int, ...] = (2,), seed: int = 0) -> str:
    """An untrained prior of d = 16 in ``folder``."""
    config = PriorConfig(
        d=D, layers=layers, subject_layers=4, d_model=32, d_mlp=64, n_blocks=2, variance_floor=1e-6
    )
    rows = (len(layers), D)
    prior = ActivationPrior.untrained(config, torch.full(rows, 0.5), torch.full(rows, 4.0), seed=seed)
    prior.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a prior of one layer, 2."""
    return save_prior(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a prior like ``single`` with other weights."""
    return save_prior(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a prior of two layers, 1 and 3."""
    return save_prior(tmp_path_factory.mktemp("several"), layers=(1, 3), seed=1)


@pytest.fixture(scope="session")
def builder() -> Any:
    """The application builder of ``serve/app.py``."""
    spec = importlib.util.spec_from_file_location("serve_app", Path(__file__).parents[2] / "serve" / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app
