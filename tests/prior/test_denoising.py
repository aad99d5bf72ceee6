import torch
from gaussians import gaussian_prior, random_covariance
from torch.distributions import MultivariateNormal

from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.noise import normal

D = 12


def gaussian_rows(n: int, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (
        MultivariateNormal(torch.zeros(len(covariance), dtype=torch.float64), covariance).sample((n,)).float()
    )


def test_samples_have_the_right_covariance():
    covariance = random_covariance(D)
    x = gaussian_prior(covariance).sample(20_000, steps=40).double()
    assert (torch.cov(x.T) - covariance).abs().max() < 0.12
    assert x.mean(0).abs().max() < 0.06


def test_denoise_mean_is_the_posterior_mean():
    covariance = random_covariance(D)
    x, u = gaussian_rows(30, covariance), 0.4
    noisy = (1 - u) * x + u * normal(5, torch.arange(30), D)
    gain = (1 - u) * covariance @ torch.linalg.inv((1 - u) ** 2 * covariance + u**2 * torch.eye(D))
    restored = gaussian_prior(covariance).denoise(x, u=u, mode="mean", seed=5)
    assert torch.allclose(restored.double(), noisy.double() @ gain.T, atol=1e-4)


def test_denoise_samples_keep_the_distribution():
    covariance = random_covariance(D)
    x = gaussian_rows(20_000, covariance)
    restored = gaussian_prior(covariance).denoise(x, u=0.5, steps=20).double()
    assert (torch.cov(restored.T) - covariance).abs().max() < 0.15
    assert torch.equal(gaussian_prior(covariance).denoise(x[:5], u=0.0), x[:5])


def test_level_zero_gives_the_row_back_exactly():
    covariance = random_covariance(D)
    prior = gaussian_prior(covariance, torch.linspace(-3, 3, D), torch.linspace(0.1, 10, D))
    x = torch.randn(5, D) * 7
    assert torch.equal(prior.denoise(x, u=0.0), x)
    mixed = prior.denoise(x, u=torch.tensor([0.0, 0.5, 0.0, 0.5, 0.2]))
    assert torch.equal(mixed[[0, 2]], x[[0, 2]])
    assert not torch.isclose(mixed[1], x[1]).any()


def test_a_level_for_each_row_equals_calls_of_one_level():
    covariance = random_covariance(D)
    prior, x = gaussian_prior(covariance), gaussian_rows(6, covariance)
    u = torch.tensor([0.25, 0.5, 1.0, 0.25, 0.75, 0.5], dtype=torch.float64)
    for mode in ("sample", "mean"):
        together = prior.denoise(x, u=u, mode=mode)
        for i in range(6):
            alone = prior.denoise(x[i : i + 1], u=float(u[i]), ids=[i], mode=mode)
            assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_levels_for_a_distance_keep_within_it_and_the_next_do_not():
    covariance = random_covariance(D)
    scale, mean = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)
    prior = gaussian_prior(covariance, mean, scale)
    x = gaussian_rows(60, covariance) * scale + mean
    budget = 0.4
    u = prior.level_for_distance(x, budget, seed=3)

    def moved(levels):
        z, restored = (x - mean) / scale, (prior.denoise(x, u=levels, seed=3) - mean) / scale
        return (restored - z).norm(dim=1) / z.norm(dim=1)

    assert (moved(u) <= budget + 1e-4).all()
    above = u < 1
    assert above.sum() > 50
    assert (moved((u + 1 / 32).clamp(max=1))[above] > budget - 1e-4).all()
    assert len(u.unique()) > 3
    alone = prior.level_for_distance(x[7:8], budget, seed=3, ids=[7])
    assert float(alone[0]) == float(u[7])


def test_levels_at_the_ends():
    prior = gaussian_prior(random_covariance(D))
    x = torch.randn(4, D)
    assert torch.equal(prior.level_for_distance(x, 0.0), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(prior.level_for_distance(x, 100.0), torch.ones(4, dtype=torch.float64))
    assert float(prior.level_for_distance(torch.zeros(1, D), 0.5)[0]) == 0


def test_encode_averages_over_noises():
    config = PriorConfig(d=8, layers=(0,), d_model=16, d_mlp=24, n_blocks=2, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8))
    x = torch.randn(5, 8)
    one, four = prior.encode(x, u=0.5), prior.encode(x, u=0.5, noises=4)
    assert four.shape == (5, 48)
    assert not torch.allclose(one, four)
    mean = torch.stack([prior.encode(x, u=0.5, seed=s, noises=64) for s in range(2)])
    assert (mean[0] - mean[1]).std() < 0.4 * (prior.encode(x, u=0.5, seed=1) - one).std()
    assert torch.allclose(prior.encode(x, u=0.5, noises=4, block=1), four[:, 24:])
    half = prior.encode(x, u=0.5, precision="bfloat16")
    assert torch.allclose(half, one, atol=0.05)


def test_bfloat16_denoises_and_samples_alike():
    config = PriorConfig(d=8, layers=(0,), d_model=16, d_mlp=24, n_blocks=2, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(8), torch.ones(8))
    x = torch.randn(20, 8)
    for call in (lambda p: prior.denoise(x, precision=p), lambda p: prior.sample(20, precision=p)):
        full, half = call("float32"), call("bfloat16")
        assert half.dtype == torch.float32
        assert 0 < (full - half).abs().max() < 0.05
