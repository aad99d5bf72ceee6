"""May a run go on? What decides its result is compared, named field by field, and what an earlier version wrote too.

``tests/saved`` holds what the version before fields were marked wrote: `train.json` of a run, manifests of the others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, JobConfig, SampleConfig, ScoreConfig
from dmm_ray.batch.job import arguments_of
from dmm_ray.config import RESUMABLE, Config, Group, identity_as_saved, refuse_other
from dmm_ray.errors import UserError
from dmm_ray.prior.config import PriorConfig
from dmm_ray.store.manifest import Manifest, read_manifest
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.run_folder import SavedRun, saved_run

SAVED = Path(__file__).parent / "saved"
RUN: dict[str, Any] = {
    "activations": "/data/store", "layer": 2, "samples": 256, "batch": 64, "levels_per_batch": 16, "d_model": 32,
    "d_mlp": 64, "n_blocks": 1, "lr": 3e-3, "workers": 0, "wandb": "disabled", "precision": "float32",
    "split": {"seed": 1, "train": 0.6, "validation": 0.2, "test": 0.2}, "validation_rows": 64, "calibration_rows": 0,
    "checkpoint_every": 64, "keep_best": True,
}  # fmt: skip
JOB: dict[str, Any] = {"prior": "/data/prior", "out": "", "precision": "float32"}
STORE: dict[str, Any] = {**JOB, "activations": "/data/store"}
JOBS: dict[str, JobConfig] = {
    "score": ScoreConfig(**STORE, steps=2, window_tokens=8, split="test"),
    "denoise": DenoiseConfig(**STORE, steps=2, rows=20),
    "encode": EncodeConfig(**STORE, features=[1, 2]),
    "sample": SampleConfig(**JOB, n=10, steps=2),
}


class Inner(Config):
    seed: int = 0
    where: str = Field(default="here", json_schema_extra=RESUMABLE)


class Optimizer(Group):
    lr: float = 0.5
    fused: bool = Field(default=True, json_schema_extra=RESUMABLE)


class Workers(Group):
    workers: int = 1


class Outer(Config):
    out: str = Field(json_schema_extra=RESUMABLE)
    levels: tuple[float, ...] = (0.5,)
    inner: Inner = Inner()
    optimizer: Optimizer = Optimizer()
    pool: Workers = Field(default=Workers(), json_schema_extra=RESUMABLE)


def test_identity_is_every_field_that_is_not_marked() -> None:
    assert Outer(out="a").identity() == {"levels": [0.5], "inner.seed": 0, "lr": 0.5}
    moved = Outer(
        out="b", inner=Inner(where="there"), optimizer=Optimizer(fused=False), pool=Workers(workers=2)
    )
    assert moved.identity() == Outer(out="a").identity()


def test_a_field_that_an_earlier_version_did_not_record_has_its_default() -> None:
    saved = {"inner.seed": 0}
    assert identity_as_saved(Outer(out="a"), saved) == saved
    changed = Outer(out="a", levels=(0.1,), optimizer=Optimizer(lr=1))
    assert identity_as_saved(changed, saved) == {**saved, "levels": [0.1], "lr": 1}


def test_every_difference_is_named_with_both_values_and_the_remedy() -> None:
    refuse_other("runs/a", {"seed": 0, "u": [0.5]}, {"seed": 0, "u": [0.5]})
    with pytest.raises(UserError) as refused:
        refuse_other("runs/a", {"seed": 0, "u": [0.5], "text": "a" * 64}, {"seed": 1, "u": [0.5], "n": 3})
    assert str(refused.value) == (
        "seed: runs/a was made with 0, not 1; n: None, not 3; text: aaaaaaaaaaaa, not None; choose another --out, or "
        "give the same values to resume"
    )


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    """The saved run, in a folder of its own."""
    shutil.copy(SAVED / "train.json", tmp_path)
    found = saved_run(str(tmp_path))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": "s3://moved/store", "out": "/elsewhere"},
        {"workers": 2, "min_workers": 1, "parallel": "fsdp", "micro_batch": 16, "device": "cuda"},
        {"checkpoint_every": 128, "keep_best": False, "calibration_rows": 9, "wandb": "offline"},
    ],
)
def test_a_saved_run_goes_on(run: SavedRun, changes: dict[str, Any]) -> None:
    run.check(TrainConfig(**{**RUN, "out": run.out, **changes}), run.prior)


def test_another_run_is_refused(run: SavedRun) -> None:
    other = TrainConfig(**{**RUN, "out": run.out, "batch": 128, "lr": 0.1, "split": {"seed": 2}})
    with pytest.raises(UserError) as refused:
        run.check(other, run.prior)
    for said in (
        "split.seed: ",
        "1, not 2",
        "batch: 64, not 128",
        "lr: 0.003, not 0.1",
        "split.train: 0.6, not 0.9",
    ):
        assert said in str(refused.value)
    config = TrainConfig(**RUN, out=run.out)
    for changes, said in (
        ({"training": {"store": "b" * 64}}, "^activations: .* was made with .{12}, not b{12};"),
        ({"d": 64}, "^d: .* was made with 32, not 64;"),
    ):
        with pytest.raises(UserError, match=said):
            run.check(config, run.prior.model_copy(update=changes))


def test_a_damaged_record_of_a_run_is_one_line(tmp_path: Path) -> None:
    saved = json.loads((SAVED / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(saved | {"prior": {"d": "wide"}}))
    with pytest.raises(UserError, match=r"train\.json: not a run of this version \("):
        saved_run(str(tmp_path))


@pytest.mark.parametrize("verb", JOBS)
def test_a_saved_job_goes_on(tmp_path: Path, verb: str) -> None:
    shutil.copy(SAVED / f"{verb}.json", tmp_path / "manifest.json")
    there = read_manifest(str(tmp_path))
    assert there.derived is not None
    asked = JOBS[verb].model_copy(update={"out": str(tmp_path), "prior": "/moved", "seed": 0})
    arguments = arguments_of(asked)
    # What the verb itself adds: the calibration's hash, the number format of the store.
    arguments |= {k: v for k, v in there.derived.arguments.items() if k in ("calibration", "dtype")}
    now = there.model_copy(update={"derived": there.derived.model_copy(update={"arguments": arguments})})
    assert now.sealed().config_hash == there.config_hash


def test_a_saved_extraction_goes_on() -> None:
    there = Manifest.model_validate_json((SAVED / "extract.json").read_text())
    assert there.sealed().config_hash == there.config_hash


def test_a_prior_s_identity_is_its_shape() -> None:
    prior = PriorConfig(d=8, layers=(1,), d_model=16, d_mlp=16, n_blocks=1, variance_floor=1e-6)
    moved = prior.model_copy(update={"subject": {"id": "elsewhere"}, "training": {"samples": 3}})
    assert moved.identity() == prior.identity()


def test_drawn_rows_have_no_corpus_and_keep_the_hash_that_earlier_versions_gave_them() -> None:
    found = Manifest.model_validate_json((SAVED / "sample.json").read_text())
    assert (found.corpus, found.documents) == (None, 10)
    assert found.sealed().config_hash == found.config_hash
    with pytest.raises(UserError, match="drawn from a prior have no text"):
        _ = found.text
