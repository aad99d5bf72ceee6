from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from batch_cases import SCORE, all_rows, files, ids_of
from stores import units_here

from dmm_ray import ActivationPrior, ActivationStore
from dmm_ray.batch import job
from dmm_ray.batch.config import ScoreConfig
from dmm_ray.batch.inputs import extract_first
from dmm_ray.batch.verbs import score
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.prior.windows import window_means
from dmm_ray.store.info import describe
from dmm_ray.store.split import TEST, Split
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.units.lock import writer_lock


def table(folder: Path) -> dict[str, np.ndarray]:
    """All rows of the shards, nulls as NaN."""
    found = pq.read_table(folder / "layer_02")
    return {name: found[name].to_pandas().to_numpy() for name in found.column_names}


def test_scores_are_those_of_the_prior(scores: Path, prior: str, store: ActivationStore) -> None:
    found, rows = table(scores), all_rows(store)
    for name in ("doc", "position", "token_id"):
        assert np.array_equal(found[name], getattr(rows, name))
    expected = ActivationPrior.from_pretrained(prior).log_prob(rows.activation, steps=2, ids=ids_of(rows))
    for name in ("nats", "nats_per_dim", "stderr", "base", "divergence"):
        assert np.allclose(found[name], getattr(expected, name), rtol=1e-4, atol=1e-4), name
    for name in ("percentile", "latent_percentile", "combined_percentile"):
        assert np.allclose(found[name], getattr(expected, name), atol=0.5), name
        assert np.ptp(found[name]) > 50
    means = window_means(found["nats_per_dim"], rows.doc, rows.position, 8)
    assert np.allclose(found["window_nats_per_dim"], means, rtol=1e-5, equal_nan=True)
    there = np.isfinite(means)
    assert 0 < there.sum() < len(means)
    assert np.array_equal(np.isfinite(found["window_percentile"]), there)
    assert np.array_equal(np.isfinite(found["window_combined_percentile"]), there)


def test_the_folder_says_what_it_is(
    scores: Path, store: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, summary = (
        json.loads((scores / f"{name}.json").read_text()) for name in ("manifest", "summary")
    )
    assert manifest["derived"]["verb"] == "score"
    assert manifest["derived"]["activations_hash"] == store.manifest.config_hash
    assert manifest["derived"]["columns"]["nats"].endswith("nats")
    assert manifest["units"] > store.manifest.units
    figures, found = summary["figures"], table(scores)
    assert figures["rows"] == store.rows
    assert figures["documents"] == len(np.unique(found["doc"]))
    assert figures["means"]["nats"] == pytest.approx(float(found["nats"].mean()), rel=1e-5)
    assert figures["quantiles"]["nats_per_dim"]["p50"] == pytest.approx(
        np.median(found["nats_per_dim"]), abs=0.1
    )
    assert figures["rows_per_s"] > 0
    assert any("dmm score" in line for line in describe(str(scores)))
    assert verify(VerifyConfig(store=str(scores))) == str(scores)
    copy = Path(shutil.copytree(scores, tmp_path / "copy"))
    shard = copy / "layer_02" / "shard-000001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckFailed, match="its content is not what was written"):
        verify(VerifyConfig(store=str(copy)))
    with pytest.raises(UserError, match="contains the output of `dmm score`, not activations"):
        ActivationStore.open(str(scores))


def test_two_actors_finish_what_one_began(
    scores: Path, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(scores, tmp_path / "copy"))
    (copy / "summary.json").unlink()
    records = sorted((copy / "shards").iterdir())
    for record in records[2:]:
        record.unlink()
    (copy / "layer_02" / "shard-000002.parquet.tmp-0123abcd").write_bytes(b"left over")
    before = {p: p.stat().st_mtime_ns for p in [*records[:2], copy / "layer_02" / "shard-000001.parquet"]}
    with caplog.at_level(logging.INFO):
        score(ScoreConfig(out=str(copy), **{**options, "actors": 2}, **SCORE))
    assert f"2 of {len(records)} units are done" in caplog.text
    assert files(copy) == files(scores)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    caplog.clear()
    with caplog.at_level(logging.INFO):
        score(ScoreConfig(out=str(copy), **options, **SCORE))
    assert "complete already" in caplog.text


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"steps": 3}, "steps"),
        ({"probes": 1}, "probes"),
        ({"seed": 1}, "seed"),
        ({"split": "test"}, "split"),
        ({"rows": 100}, "rows"),
        ({"window_tokens": 4}, "window_tokens"),
        ({"precision": "bfloat16"}, "precision"),
        ({"rows_per_shard": 200}, "rows_per_shard"),
    ],
)
def test_another_configuration_is_refused(
    scores: Path, options: dict[str, Any], changes: dict[str, Any], option: str
) -> None:
    before = files(scores)
    with pytest.raises(UserError, match=f"^{option}: .* was made with .*, not .*; choose another --out"):
        score(ScoreConfig(**{**options, **SCORE, "out": str(scores), **changes}))
    assert files(scores) == before


@pytest.mark.parametrize("part", ["weights", "statistics", "configuration", "calibration"])
def test_another_prior_is_refused(
    scores: Path, options: dict[str, Any], prior: str, tmp_path: Path, part: str
) -> None:
    """By what it holds, wherever it lies."""
    given = {**options, **SCORE, "out": str(scores), "prior": str(tmp_path / "prior")}
    other = ActivationPrior.from_pretrained(prior)
    other.save_pretrained(given["prior"])
    assert score(ScoreConfig(**given)) == str(scores)
    other.calibration = None
    if part == "weights":
        other.denoiser.out_proj.bias.data.add_(1)
    elif part == "statistics":
        other.normalizer.mean.add_(1)
    elif part == "configuration":
        other.config = other.config.model_copy(update={"variance_floor": 1e-5})
    shutil.rmtree(given["prior"])
    other.save_pretrained(given["prior"])
    with pytest.raises(
        UserError, match=rf"^{'calibration' if part == 'calibration' else 'prior'}: .* was made with"
    ):
        score(ScoreConfig(**given))


def test_one_writer_at_a_time(options: dict[str, Any], tmp_path: Path) -> None:
    with (
        writer_lock(str(tmp_path)),
        pytest.raises(UserError, match=rf"out: {tmp_path} is being written by process \d+"),
    ):
        score(ScoreConfig(out=str(tmp_path), **options, **SCORE))


def test_proxy_on_drawn_rows_of_a_part(
    prior: str, options: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    config = ScoreConfig(out=str(tmp_path / "out"), split="test", rows=100, proxy=True, **options)
    with units_here():
        found, rows = table(Path(score(config))), all_rows(store)
    assert len(found["doc"]) == 100
    assert np.array_equal(found["doc"], np.sort(found["doc"]))
    model = ActivationPrior.from_pretrained(prior)
    assert (Split.model_validate(model.config.split).of(found["doc"]) == TEST).all()
    errors = model.velocity_error(rows.activation, ids=ids_of(rows))
    by_name = dict(zip(map(tuple, ids_of(rows).tolist()), errors.tolist(), strict=True))
    names = zip(found["doc"].tolist(), found["position"].tolist(), strict=True)
    assert np.allclose(found["velocity_error"], [by_name[name] for name in names], rtol=1e-4)
    assert np.ptp(found["proxy_percentile"]) > 50
    assert set(found) == {
        "doc",
        "position",
        "token_id",
        "velocity_error",
        "proxy_percentile",
        "window_velocity_error",
    }


def test_text_is_extracted_first(
    prior: str, store: ActivationStore, tiny_text: Path, tiny_subject: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    given = {"prior": prior, "text": str(tiny_text), "out": str(out), "actors": 1, "cpus_per_actor": 1}
    with units_here():
        assert score(ScoreConfig(**given, **SCORE)) == str(out)
    extracted = ActivationStore.open(f"{out}-activations")
    assert extracted.layers == (2,)
    assert extracted.rows == store.rows
    assert np.array_equal(table(out)["token_id"], all_rows(extracted).token_id)
    near = torch.cosine_similarity(all_rows(extracted).activation.float(), all_rows(store).activation)
    assert near.min() > 0.99


def test_text_is_extracted_by_the_prior_s_own_token_selection(
    prior: str, tiny_text: Path, tmp_path: Path
) -> None:
    """As the store that it was trained on had it; a window that is given overrides the recorded one."""
    trained = ActivationPrior.from_pretrained(prior)
    kept = TokenSelection(keep_first=True, tokens_per_doc=3)
    record = {"training": {"window": 24, "kept": kept.model_dump()}}
    trained.config = trained.config.model_copy(update=record)
    trained.save_pretrained(str(tmp_path / "prior"))
    config = ScoreConfig(prior=str(tmp_path / "prior"), text=str(tiny_text), out=str(tmp_path), actors=1)
    for window in (None, 16):
        out = str(tmp_path / f"store{window}")
        with units_here():
            extract_first(config.model_copy(update={"window": window}), trained, 2, out)
        manifest = ActivationStore.open(out).manifest
        assert (manifest.kept, manifest.window) == (kept, window or 24)


@pytest.mark.parametrize("fast", [True, False])
def test_precision_follows_the_machine_and_a_resume_keeps_it_on_another(
    scores: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    config = ScoreConfig(**{**options, **SCORE, "out": str(tmp_path / "new"), "precision": "auto"})
    monkeypatch.setattr(job, "actors_have_fast_bfloat16", lambda pool: fast)
    assert job.settle_precision(config) == ("bfloat16" if fast else "float32")
    monkeypatch.setattr(job, "actors_have_fast_bfloat16", lambda pool: pytest.fail("asked again"))
    assert job.settle_precision(config.model_copy(update={"out": str(scores)})) == "float32"
    assert job.settle_precision(config.model_copy(update={"precision": "bfloat16"})) == "bfloat16"
