"""The TopK autoencoders: sparse, better than the mean, and each best at what it was trained for."""

import pytest
import torch

from dmm_ray.baselines import SAE


def sparse_rows(n: int, seed: int = 0) -> torch.Tensor:
    """Sums of 2 of 24 directions in 12 dimensions."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    which = torch.rand(n, 24, generator=g).topk(2, dim=1).indices
    codes = torch.zeros(n, 24).scatter(1, which, torch.rand(n, 2, generator=g) + 0.5)
    return codes @ directions / 2 + 0.3


@pytest.fixture(scope="module")
def models() -> tuple[SAE, SAE]:
    z = sparse_rows(8_000)
    plain, noised = (
        SAE.fit(z, latents=64, k=4, samples=100_000, noised=noised, seed=0) for noised in (False, True)
    )
    return plain, noised


def test_trains_far_below_the_mean(models: tuple[SAE, SAE]) -> None:
    fresh = sparse_rows(2_000, seed=1)
    error = (models[0].reconstruct(fresh) - fresh).square().mean()
    assert error < 0.15 * fresh.var(0).mean()


def test_noise_training_restores_noised_rows_better(models: tuple[SAE, SAE]) -> None:
    fresh, u = sparse_rows(2_000, seed=1), 0.5
    z_u = (1 - u) * fresh + u * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
    plain, noised = ((m.posterior_mean(z_u, u) - fresh).square().mean() for m in models)
    assert noised < plain
    assert noised < fresh.var(0).mean()


def test_at_most_k_latents_and_unit_norm_directions(models: tuple[SAE, SAE]) -> None:
    values, which = models[0]._encode(sparse_rows(100))
    assert values.shape == which.shape == (100, 4)
    assert (values >= 0).all()
    assert torch.allclose(models[0].decoder.norm(dim=1), torch.ones(64), atol=1e-5)


def test_as_a_denoiser_it_sees_the_rescaled_row_and_gives_the_mean_at_pure_noise(
    models: tuple[SAE, SAE],
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
    z = sparse_rows(2_000)
    a, b, c = (SAE.fit(z, latents=16, k=2, samples=8_000, seed=s) for s in (1, 1, 2))
    assert not a.encoder.requires_grad
    assert torch.allclose(a.encoder, b.encoder, atol=1e-5)
    assert not torch.allclose(a.encoder, c.encoder, atol=1e-2)
    assert a.n_parameters == 2 * 16 * 12 + 16 + 12


def test_more_active_latents_than_there_are_is_all_of_them() -> None:
    model = SAE.fit(sparse_rows(500), latents=8, k=100, samples=2_048)
    assert model.k == 8
    assert model.reconstruct(sparse_rows(10)).shape == (10, 12)
