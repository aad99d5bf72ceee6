"""Training over a closed-form base: fitted once, learnt over, kept by a resume, in the finished folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.test_train import config, curve

from dmm_ray import ActivationPrior
from dmm_ray.errors import UserError
from dmm_ray.training import base as training_base
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


def test_workers_see_the_targets_of_a_single_process(
    ray_local: None, train_store: str, tmp_path: Path
) -> None:
    """Two workers and one see the same targets."""
    two = config(train_store, tmp_path / "two", **BASE, workers=2, cpus_per_worker=1, samples=8 * 256)
    one = config(train_store, tmp_path / "one", **BASE, samples=8 * 256)
    train(two), train(one)
    for (_, ours, _), (_, theirs, _) in zip(curve(two.out), curve(one.out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    first, second = (ActivationPrior.from_pretrained(c.out) for c in (two, one))
    assert torch.equal(first.base.means, second.base.means)  # type: ignore[union-attr]
