"""A small store, an untrained but calibrated prior of its layer 2, and what `score` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batch_cases import LAYER, OPTIONS, SCORE, all_rows, ids_of
from stores import extract_here

from dmm_ray.batch.config import ScoreConfig
from dmm_ray.batch.verbs import score
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.calibrate import calibrate
from dmm_ray.store.reader import ActivationStore


@pytest.fixture(scope="session")
def store(tiny_subject: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """60 documents, layers 1 and 2, float32, 6 units. Do not change it."""
    out = tmp_path_factory.mktemp("batch") / "store"
    options = {
        "dtype": "float32",
        "rows_per_shard": 700,
        "actors": 1,
        "cpus_per_actor": 1,
        "layers": [1, LAYER],
    }
    return ActivationStore.open(
        extract_here(model=str(tiny_subject), text=str(tiny_text), out=str(out), **options)
    )


@pytest.fixture(scope="session")
def prior(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the prior."""
    moments, subject = store.statistics(LAYER), store.manifest.subject
    config = PriorConfig(
        d=store.d, layers=(LAYER,), subject_layers=4, d_model=32, d_mlp=48, n_blocks=2, variance_floor=1e-6,
        subject=subject.model_dump(), split={"seed": 0, "train": 0.6, "validation": 0.2, "test": 0.2},
    )  # fmt: skip
    made = ActivationPrior.untrained(config, torch.from_numpy(moments.mean), torch.from_numpy(moments.var))
    rows = all_rows(store)
    made.calibration = calibrate(made, rows.activation[:300], ids_of(rows)[:300], steps=2)
    folder = tmp_path_factory.mktemp("batch") / "prior"
    made.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def options(prior: str, store: ActivationStore) -> dict[str, Any]:
    """Of a job on the whole store, all but ``out``."""
    return {"prior": prior, "activations": store.uri, **OPTIONS}


@pytest.fixture(scope="session")
def scores(ray_local: None, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dmm score` with one actor writes. Do not change it."""
    out = tmp_path_factory.mktemp("batch") / "scores"
    return Path(score(ScoreConfig(out=str(out), **options, **SCORE)))
