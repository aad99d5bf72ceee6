"""Denoise, encode and sample: what they write, and who can read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from batch_cases import LAYER, OPTIONS, all_rows, ids_of
from stores import units_here

from dmm_ray import ActivationPrior, ActivationStore
from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, SampleConfig
from dmm_ray.batch.verbs import denoise, encode, sample
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.store.info import describe
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    """That a job on Ray writes the same is shown with `score`."""
    with units_here():
        yield


def test_denoise_writes_a_store_to_verify_and_train_on(
    prior: str, options: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    out = denoise(DenoiseConfig(out=str(tmp_path / "out"), u=0.3, steps=2, **options))
    made, before = ActivationStore.open(out), all_rows(store)
    after = all_rows(made)
    model = ActivationPrior.from_pretrained(prior)
    expected = model.denoise(before.activation, u=0.3, steps=2, ids=ids_of(before))
    assert np.array_equal(after.position, before.position)
    assert torch.allclose(after.activation, expected, atol=1e-5)
    assert made.statistics(LAYER).count == store.rows
    assert made.layers == (LAYER,)
    assert json.loads(Path(out, "summary.json").read_text())["figures"]["rows"] == store.rows
    assert any(f"dmm denoise with {prior}" in line for line in describe(out))
    assert verify(VerifyConfig(store=out)) == out
    shape = {"d_model": 16, "d_mlp": 16, "n_blocks": 1, "batch": 64, "levels_per_batch": 16}
    trained = train(
        TrainConfig(
            activations=out, out=str(tmp_path / "prior"), samples=128, workers=0, wandb="disabled", **shape
        )
    )
    assert ActivationPrior.from_pretrained(trained).config.subject["id"] == store.manifest.subject.id


def test_denoise_within_a_distance(
    prior: str, options: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    config = DenoiseConfig(out=str(tmp_path), distance=0.2, steps=2, rows=200, dtype="bfloat16", **options)
    after = all_rows(ActivationStore.open(denoise(config)))
    assert len(after.doc) == 200
    assert after.activation.dtype == torch.bfloat16
    rows, model = all_rows(store), ActivationPrior.from_pretrained(prior)
    place = {name: i for i, name in enumerate(map(tuple, ids_of(rows).tolist()))}
    x = rows.activation[[place[name] for name in map(tuple, ids_of(after).tolist())]]
    z, moved = model.normalizer.normalize(x), model.normalizer.normalize(after.activation)
    assert ((moved - z).norm(dim=1) <= 0.2 * z.norm(dim=1) + 0.1).all()
    assert ((moved - z).norm(dim=1) > 0.05 * z.norm(dim=1)).float().mean() > 0.5


def test_encode_is_read_with_numpy(
    prior: str, options: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    chosen = [5, 0, 47]
    config = EncodeConfig(
        out=str(tmp_path),
        u=0.2,
        block=1,
        noises=2,
        features=chosen,
        dtype="float16",
        batch_rows=37,
        **options,
    )
    found = pq.read_table(Path(encode(config)) / "layer_02" / "shard-000003.parquet")
    features = np.frombuffer(b"".join(found["features"].to_pylist()), np.float16).reshape(len(found), 3)
    assert found.schema.metadata[b"dtype"] == b"float16"
    rows = all_rows(store)
    inside = np.isin(rows.doc, found["doc"])
    expected = ActivationPrior.from_pretrained(prior).encode(
        rows.activation[inside], u=0.2, block=1, ids=ids_of(rows)[inside], noises=2
    )
    assert np.allclose(features, expected[:, chosen], rtol=2e-3, atol=1e-4)
    assert verify(VerifyConfig(store=str(tmp_path))) == str(tmp_path)


def test_sample_writes_a_store(prior: str, tmp_path: Path) -> None:
    out = sample(SampleConfig(prior=prior, n=200, out=str(tmp_path), steps=2, seed=3, **OPTIONS))
    rows = all_rows(ActivationStore.open(out))
    assert np.array_equal(rows.doc, np.arange(200))
    assert not rows.position.any()
    expected = ActivationPrior.from_pretrained(prior).sample(200, steps=2, seed=3)
    assert torch.allclose(rows.activation, expected, atol=1e-5)
    assert verify(VerifyConfig(store=out)) == out
