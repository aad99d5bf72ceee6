import torch

from dmm_ray.prior.flow import NOISE_LEVELS, batch_levels, interpolate, posterior_mean


def test_ends_of_the_path():
    z, noise = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(interpolate(z, noise, 0.0), z)
    assert torch.equal(interpolate(z, noise, 1.0), noise)
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    z_u = interpolate(z, noise, u)
    assert torch.allclose(posterior_mean(z_u, noise - z, u), z, atol=1e-6)


def test_levels_are_stratified_integers():
    u = batch_levels(seed=1, batch=7, distinct=256)
    levels = u * NOISE_LEVELS
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert ((levels - 1) // (NOISE_LEVELS / 256) - torch.arange(256)).abs().max() <= 1


def test_levels_are_uniform_over_all_integers():
    counts = torch.zeros(NOISE_LEVELS + 1)
    for batch in range(400):
        u = batch_levels(0, batch, 100)
        counts += torch.bincount((u * NOISE_LEVELS).round().long(), minlength=NOISE_LEVELS + 1)
    assert counts[0] == 0
    assert counts[1:].min() > 15
    assert counts[1:].max() < 75


def test_levels_are_a_function_of_seed_and_batch():
    again = batch_levels(0, 5, 16)
    assert torch.equal(batch_levels(0, 5, 16), again)
    assert not torch.equal(batch_levels(0, 6, 16), again)
    assert not torch.equal(batch_levels(1, 5, 16), again)
