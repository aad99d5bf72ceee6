"""Training over a closed-form base: fitted once, learnt over, kept by a resume, in the finished folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.test_train import config, curve

from dmm_ray import ActivationPrior
from dmm_ray.errors import UserError
from dmm_ray.training import base as training_base
from dmm_ray.training.base import FILE, load_base
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.step import FlowBatch
from dmm_ray.training.train import train

BASE = {"base": "mixture", "base_sizes": (4, 8)}


@pytest.fixture(scope="module")
def based(train_store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("based") / "prior"
    return Path(train(config(train_store, out, **BASE)))


def test_the_prior_s_folder_has_the_base(based: Path) -> None:
    prior = ActivationPrior.from_pretrained(str(based))
    assert (prior.config.base, prior.base.means.shape[1]) == ("mixture", 32)  # type: ignore[union-attr]
    assert prior.denoiser.out_proj.weight.abs().max() > 0
    saved = (based / "base.safetensors").read_bytes()
    assert b"validation_loss" in saved[:1000]
    x = prior.sample(5, steps=4)
    assert prior.log_prob(x, steps=4).nats.isfinite().all()


def test_the_network_corrects_the_base(train_store: str, tmp_path: Path) -> None:
    this = config(train_store, tmp_path / "a", base="gaussian", samples=120 * 256, validate_every=512)
    train(this)
    losses = [validation for _, _, validation in curve(this.out) if validation is not None]
    assert losses[-1] < losses[0] - 0.01


def test_the_same_base_is_not_fitted_again_and_another_is_refused(
    based: Path, train_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_base, "_fit", lambda *_: pytest.fail("fitted again"))
    assert train(config(train_store, based, **BASE)) == str(based)
    with pytest.raises(UserError, match=r"base: .* was made with mixture, not gaussian"):
        train(config(train_store, based, base="gaussian"))
    with pytest.raises(UserError, match="base_sizes: "):
        train(config(train_store, based, base="mixture", base_sizes=(4,)))


def test_a_base_that_a_killed_command_left_is_taken_or_fitted_anew(
    train_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fit = training_base._fit
    monkeypatch.setattr(training_base, "_fit", lambda *a: calls.append(1) or fit(*a))
    monkeypatch.setattr(
        "dmm_ray.training.train.settle_samples", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    for base, fits in (("gaussian", 1), ("gaussian", 1), ("mixture", 2)):
        with pytest.raises(KeyboardInterrupt):
            train(config(train_store, tmp_path / "a", base=base, base_sizes=(4,)))
        assert len(calls) == fits
        assert not (tmp_path / "a" / "train.json").exists()


def test_workers_see_the_targets_of_a_single_process(based: Path, train_store: str) -> None:
    this = config(train_store, based, **BASE)
    base = load_base(this, ActivationPrior.from_pretrained(str(based)).config)
    z = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    whole, plain = FlowBatch(this, 3, slice(0, 256), z, base), FlowBatch(this, 3, slice(0, 256), z)
    assert torch.equal(whole.z_u, plain.z_u)
    for low, high in ((0, 85), (85, 170), (170, 256)):
        part = FlowBatch(this, 3, slice(low, high), z[low:high], base)
        torch.testing.assert_close(part.target, whole.target[low:high], rtol=1e-5, atol=1e-5)
    assert base is not None
    torch.testing.assert_close(plain.target - whole.target, base.velocity(whole.z_u, whole.u_B))


def test_a_damaged_base_is_named(based: Path, train_store: str, tmp_path: Path) -> None:
    this = config(train_store, tmp_path, **BASE)
    (tmp_path / FILE).write_bytes((based / FILE).read_bytes()[:-50])
    with pytest.raises(UserError, match=r"base\.safetensors: damaged"):
        load_base(this, ActivationPrior.from_pretrained(str(based)).config)


def test_a_base_has_fewer_levels_in_a_batch_unless_they_are_given() -> None:
    given = {"activations": "a", "out": "b"}
    levels = [
        TrainConfig.model_validate(given | more).schedule.levels_per_batch
        for more in ({}, {"base": "mixture"}, {"base": "mixture", "levels_per_batch": 64})
    ]
    assert levels == [256, 32, 64]
    saved = TrainConfig.model_validate(given | {"base": "mixture"}).model_dump(mode="json")
    assert TrainConfig.model_validate(saved).schedule.levels_per_batch == 32
