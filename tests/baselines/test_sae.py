"""Sparse autoencoders: sparse, better than the mean, each best at what it was trained for, and tuned."""

import logging

import pytest
import torch

from dmm_ray.baselines import SAE, SAEGrid, SAEOptions, train_sae, tune_sae
from dmm_ray.baselines.sae_training import _Training


def sparse_rows(n: int, seed: int = 0) -> torch.Tensor:
    """Sums of 2 of 24 directions in 12 dimensions."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    which = torch.rand(n, 24, generator=g).topk(2, dim=1).indices
    codes = torch.zeros(n, 24).scatter(1, which, torch.rand(n, 2, generator=g) + 0.5)
    return codes @ directions / 2 + 0.3


@pytest.fixture(scope="module")
def models() -> tuple[SAE, SAE, SAE]:
    """Plain TopK, noise-trained TopK, plain BatchTopK."""
    z, options = sparse_rows(8_000), SAEOptions(latents=64, k=4)
    return (
        train_sae(z, options, 300_000),
        train_sae(z, options, 300_000, noised=True),
        train_sae(z, options._replace(kind="batch_topk"), 300_000),
    )


def test_both_kinds_train_far_below_the_mean(models: tuple[SAE, SAE, SAE]) -> None:
    fresh = sparse_rows(2_000, seed=1)
    for model in (models[0], models[2]):
        error = (model.reconstruct(fresh) - fresh).square().mean()
        assert error < 0.15 * fresh.var(0).mean()


def test_noise_training_restores_noised_rows_better(models: tuple[SAE, SAE, SAE]) -> None:
    fresh, u = sparse_rows(2_000, seed=1), 0.5
    z_u = (1 - u) * fresh + u * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
    plain, noised = ((m.posterior_mean(z_u, u) - fresh).square().mean() for m in models[:2])
    assert noised < plain
    assert noised < fresh.var(0).mean()


def test_batch_topk_is_active_about_k_times_a_row_by_its_threshold(models: tuple[SAE, SAE, SAE]) -> None:
    model, fresh = models[2], sparse_rows(2_000, seed=1)
    active = (model._latents(fresh) > model.threshold).sum(1).float()
    assert float(active.mean()) == pytest.approx(4, rel=0.25)
    assert active.unique().numel() > 1, "rows differ in how many latents they need"
    by_hand = model._latents(fresh) * (model._latents(fresh) > model.threshold) @ model.decoder + model.bias
    assert torch.allclose(model.reconstruct(fresh), by_hand, atol=1e-5)


def test_a_batch_keeps_its_k_largest_latents_of_all_rows() -> None:
    training = _Training(sparse_rows(512), SAEOptions(latents=16, k=2, kind="batch_topk"), 1, False, 0)
    source = sparse_rows(10, seed=3)
    code = training._encode(source)
    latents = (source - training.bias) @ training.encoder.T + training.encoder_bias
    assert len(code.values) == 20
    largest = latents.flatten().topk(20).values.relu()
    assert torch.allclose(code.values.sort().values, largest.sort().values, atol=1e-6)
    ends = [*code.starts[1:].tolist(), 20]
    for row, (start, end) in enumerate(zip(code.starts.tolist(), ends, strict=True)):
        assert torch.allclose(code.values[start:end], latents[row, code.latents[start:end]].relu(), atol=1e-6)


def test_unit_norm_directions_and_dead_latents_are_counted(models: tuple[SAE, SAE, SAE]) -> None:
    for model in models:
        assert torch.allclose(model.decoder.norm(dim=1), torch.ones(64), atol=1e-5)
    model = train_sae(sparse_rows(2_000), SAEOptions(latents=32, k=4), 20_000)
    before = model.count_dead(sparse_rows(2_000))
    model.encoder_bias[:5] = -1e6
    assert before < 20
    assert model.count_dead(sparse_rows(2_000)) >= before + 3


def test_as_a_denoiser_it_sees_the_rescaled_row_and_gives_the_mean_at_pure_noise(
    models: tuple[SAE, SAE, SAE],
) -> None:
    model, z = models[0], sparse_rows(30)
    u = torch.tensor([0.25, 0.5, 1.0]).repeat(10)
    got = model.posterior_mean(z, u)
    assert torch.allclose(got[0::3], model.reconstruct(z[0::3] / 0.75), atol=1e-5)
    assert torch.allclose(got[2::3], model.mean.expand(10, -1))
    velocity = model.velocity(z, u)
    assert torch.allclose(velocity, (z - got) / u[:, None], atol=1e-5)
    assert torch.allclose(model.velocity(z, 0.0), -model.reconstruct(z), atol=1e-5)


def test_weights_carry_no_gradient_and_follow_the_seed() -> None:
    z, options = sparse_rows(2_000), SAEOptions(latents=16, k=2)
    a, b, c = (train_sae(z, options, 8_000, seed=s) for s in (1, 1, 2))
    assert not a.encoder.requires_grad
    assert torch.allclose(a.encoder, b.encoder, atol=1e-5)
    assert not torch.allclose(a.encoder, c.encoder, atol=1e-2)
    assert a.n_parameters == 2 * 16 * 12 + 16 + 12
    assert a.flops_per_row == 2 * 12 * (16 + 2)


def test_more_active_latents_than_there_are_is_all_of_them() -> None:
    model = train_sae(sparse_rows(500), SAEOptions(latents=8, k=100), 2_048)
    assert model.k == 8
    assert model.reconstruct(sparse_rows(10)).shape == (10, 12)


def test_tuning_takes_the_options_that_validation_prefers() -> None:
    grid = SAEGrid(latents=(32, 64), k=(1, 4), lr=(5e-3, 1e-6), kind=("topk", "batch_topk"))
    z, validation = sparse_rows(4_000), sparse_rows(1_000, seed=1)
    for noised in (False, True):
        tuned = tune_sae(z, validation, grid, 60_000, noised=noised, seconds=600)
        assert tuned.options.lr == 5e-3
        assert len(tuned.losses) == 5
        assert min(tuned.losses, key=tuned.losses.__getitem__) == str(tuned.options)
        assert tuned.left_out == 0
        assert tuned.samples == 60_000
        assert tuned.sae.seconds > 0


def test_a_single_choice_is_trained_without_trials_and_too_little_time_is_said(caplog) -> None:
    z, validation = sparse_rows(4_000), sparse_rows(200, seed=1)
    one = SAEGrid(latents=(32,), k=(4,), lr=(5e-3,), kind=("topk",))
    assert tune_sae(z, validation, one, 20_000, noised=False, seconds=600).losses == {}
    many = one._replace(k=(4, 8), lr=(5e-3, 1e-3))
    with caplog.at_level(logging.WARNING, logger="dmm_ray"):
        tuned = tune_sae(z, validation, many, 10_000_000, noised=False, seconds=0.0)
    assert tuned.left_out == 2
    assert tuned.samples < 100_000
    assert "no time for 2 trials" in caplog.text
    assert "sae_minutes" in caplog.text
