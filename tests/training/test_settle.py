"""What a run leaves to the machine is chosen once, recorded, and read from there by whatever machine resumes it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dmm_ray import precision
from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior
from dmm_ray.store.split import Split
from dmm_ray.training import settle
from dmm_ray.training.config import DEFAULT_SAMPLES, TrainConfig
from dmm_ray.training.loop import Trainer
from dmm_ray.training.train import train

FIELDS: dict[str, Any] = {
    "layer": 2, "batch": 256, "levels_per_batch": 64, "d_model": 32, "d_mlp": 64, "n_blocks": 2, "workers": 0,
    "calibration_rows": 0, "shuffle_rows": 2000, "split": Split(seed=1), "wandb": "disabled",
}  # fmt: skip


def config(store: str, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(activations=store, out=str(out), **(FIELDS | {"samples": 4 * 256} | changes))


def recorded(out: Path) -> dict[str, Any]:
    return json.loads((out / "train.json").read_text())["train"]


def fast(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    """A machine that is fast in bfloat16, or not."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: answer)


@pytest.mark.parametrize("answer", [True, False])
def test_precision_follows_the_machine_and_a_resume_keeps_it_on_another(
    train_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, answer: bool
) -> None:
    fast(monkeypatch, answer)
    chosen = "bfloat16" if answer else "float32"
    this = config(train_store, tmp_path / "prior")
    with caplog.at_level(logging.INFO):
        out = Path(train(this))
    assert f"precision: {chosen}, the faster one on the devices" in caplog.text
    assert recorded(out)["precision"] == chosen
    assert ActivationPrior.from_pretrained(str(out)).config.training["precision"] == chosen
    (out / "summary.json").unlink()  # as if it had been stopped at its last step
    fast(monkeypatch, not answer)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(this)
    assert "the faster one on the devices" not in caplog.text
    assert recorded(out)["precision"] == chosen
    train(this.model_copy(update={"precision": chosen}))
    other = "float32" if answer else "bfloat16"
    with pytest.raises(
        UserError, match=f"^precision: .* was made with {chosen}, not {other}; choose another --out"
    ):
        train(this.model_copy(update={"precision": other}))


def test_a_time_becomes_samples_that_a_resume_takes_instead_of_measuring(
    train_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(settle, "try_steps", lambda *_: (0.25, 0.5))
    this = config(train_store, tmp_path / "prior", samples=None, minutes=0.1, precision="float32")
    with caplog.at_level(logging.INFO):
        out = Path(train(this))
    # (6 s - 10 validations of 0.5 s) of steps of 0.25 s
    assert recorded(out)["schedule"]["samples"] == 4 * 256
    assert f"samples: {4 * 256}, about 0.1 minutes at 1024 per second" in caplog.text
    (out / "summary.json").unlink()
    monkeypatch.setattr(settle, "try_steps", lambda *_: pytest.fail("measured again"))
    assert Path(train(this)) == out
    assert json.loads((out / "stats.jsonl").read_text().splitlines()[-1])["samples"] == 4 * 256
    train(this.model_copy(update={"samples": 4 * 256, "minutes": None}))
    with pytest.raises(UserError, match=r"^minutes: .* was made with 0\.1, not 0\.2; choose"):
        train(this.model_copy(update={"minutes": 0.2}))
    with pytest.raises(
        UserError,
        match=f"^samples: .* was made with {4 * 256}, not {DEFAULT_SAMPLES}; minutes: 0.1, not None",
    ):
        train(this.model_copy(update={"minutes": None}))


def test_a_trial_leaves_no_trace_and_measures_steps_of_the_run(train_store: str, tmp_path: Path) -> None:
    this = config(train_store, tmp_path / "prior", samples=None, minutes=1.0, precision="float32")
    prior_config = train_prior_config(this)
    step_s, validation_s = settle.try_steps(
        this.model_copy(update={"samples": DEFAULT_SAMPLES}), prior_config, "cpu"
    )
    assert 0 < step_s < 5
    assert validation_s > 0
    assert not (tmp_path / "prior").exists()


def train_prior_config(this: TrainConfig) -> Any:
    from dmm_ray.store.reader import ActivationStore
    from dmm_ray.training.train import _prior_config

    return _prior_config(this, ActivationStore.open(this.activations))


def test_too_short_a_time_and_both_lengths_are_refused(
    train_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^minutes: excludes samples"):
        train(config(train_store, tmp_path / "a", minutes=1.0))
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(settle, "try_steps", lambda *_: (10.0, 0.0))
    with pytest.raises(UserError, match=r"^minutes: 0\.1 are not enough for one batch of 10\.0 s"):
        train(config(train_store, tmp_path / "b", samples=None, minutes=0.1))
    assert not (tmp_path / "b" / "train.json").exists()


def test_without_a_length_a_run_has_the_documented_one(train_store: str, tmp_path: Path) -> None:
    this = config(train_store, tmp_path / "a", samples=None)
    found = settle.settle_samples(this, train_prior_config(this))
    assert found.schedule.samples == DEFAULT_SAMPLES


def test_several_workers_are_tried_at_once_on_their_share(
    ray_local: None, train_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def call(workers: int, function: Any, *arguments: Any, **resources: float) -> list[tuple[float, float]]:
        asked.append(
            (workers, arguments[0].schedule.batch, arguments[0].schedule.levels_per_batch, resources)
        )
        return [(0.1, 0.0), (0.2, 0.0)]

    monkeypatch.setattr(settle, "call_on_workers", call)
    this = config(train_store, tmp_path / "a", samples=None, minutes=1.0, workers=2, cpus_per_worker=1)
    found = settle.settle_samples(this, train_prior_config(this))
    assert asked == [(2, 128, 64, {"cpus": 1.0, "gpus": 0.0})]
    assert found.schedule.samples == 300 * 256  # the slowest worker sets the pace


def test_steps_of_a_trial_do_not_end_with_the_run_s_samples(train_store: str, tmp_path: Path) -> None:
    import torch

    from dmm_ray.training.parallel import RankInfo

    this = config(train_store, tmp_path / "a", samples=256, precision="float32")
    run = Trainer(this, train_prior_config(this), RankInfo(0, 1, torch.device("cpu")))
    steps = run.step_seconds()
    assert all(next(steps) > 0 for _ in range(3))
    steps.close()
