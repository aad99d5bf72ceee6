import math

import pytest
import torch
from gaussians import gaussian_prior, random_covariance
from torch.distributions import MultivariateNormal

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig

D = 12


def gaussian_rows(n: int, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (
        MultivariateNormal(torch.zeros(len(covariance), dtype=torch.float64), covariance).sample((n,)).float()
    )


def trained_like_prior(d: int = 16) -> ActivationPrior:
    config = PriorConfig(d=d, layers=(0,), d_model=32, d_mlp=64, n_blocks=2, variance_floor=1e-6)
    return ActivationPrior.untrained(config, torch.zeros(d), torch.ones(d), seed=1)


def test_closed_form_gaussian_with_a_normaliser():
    covariance, mean, scale = random_covariance(D), torch.linspace(-3, 3, D), torch.linspace(0.1, 10, D)
    prior = gaussian_prior(covariance, mean, scale)
    x = gaussian_rows(200, covariance) * scale + mean
    raw = MultivariateNormal(mean.double(), scale.double()[:, None] * covariance * scale.double())
    result = prior.log_prob(x, probes=0, steps=64)
    exact = raw.log_prob(x.double())
    assert ((result.nats - exact) / D).abs().max() < 1e-3
    assert torch.equal(result.stderr, torch.zeros(200))
    assert torch.allclose(result.nats_per_dim * D, result.nats, rtol=1e-5)
    parts = result.base + result.divergence + result.log_determinant
    assert torch.allclose(parts, result.nats, atol=1e-3)
    assert result.evaluations == 128


def test_error_falls_as_the_square_of_the_steps():
    covariance = random_covariance(D)
    prior, x = gaussian_prior(covariance), gaussian_rows(100, covariance)
    exact = MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance).log_prob(x.double())
    errors = [(prior.log_prob(x, probes=0, steps=s).nats - exact).abs().mean() for s in (8, 16, 32)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_probe_mean_is_within_its_standard_error_of_the_exact_trace():
    prior = trained_like_prior()
    torch.manual_seed(0)
    x = torch.randn(300, 16)
    exact = prior.log_prob(x, probes=0, steps=8)
    estimate = prior.log_prob(x, probes=4, steps=8)
    ratio = (estimate.nats - exact.nats) / estimate.stderr
    assert ratio.mean().abs() < 4 / math.sqrt(300) * ratio.std()
    assert 0.8 < ratio.std() < 1.4
    assert estimate.stderr.min() > 0


def test_more_probes_less_error_and_one_probe_has_no_standard_error():
    prior = trained_like_prior()
    x = torch.randn(100, 16)
    exact = prior.log_prob(x, probes=0, steps=4).nats
    spread = [(prior.log_prob(x, probes=k, steps=4).nats - exact).std() for k in (1, 16)]
    assert spread[0] / spread[1] > 2.5
    assert prior.log_prob(x, probes=1, steps=4).stderr is None


def test_data_to_noise_to_data():
    covariance = random_covariance(D)
    prior = gaussian_prior(covariance)
    from dmm_ray.prior.solver import cosine_grid, integrate

    z = gaussian_rows(50, covariance)

    def velocity(s, u):
        return prior.velocity(s, u)

    noise = integrate(velocity, z, cosine_grid(0, 1, 64))
    assert (noise.std() - 1).abs() < 0.15
    assert (integrate(velocity, noise, cosine_grid(1, 0, 64)) - z).abs().max() < 0.01


def test_samples_have_the_right_covariance():
    covariance = random_covariance(D)
    x = gaussian_prior(covariance).sample(20_000, steps=40).double()
    assert (torch.cov(x.T) - covariance).abs().max() < 0.12
    assert x.mean(0).abs().max() < 0.06


def test_denoise_mean_is_the_posterior_mean():
    from dmm_ray.prior.noise import normal

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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.log_prob(torch.zeros(2, 15)), r"expected shape \(n, 16\), got \(2, 15\)"),
        (lambda p: p.log_prob(torch.zeros(0, 16)), "at least one row"),
        (
            lambda p: p.log_prob(torch.tensor([[0.0] * 16, [float("nan")] * 16])),
            "row 1 holds a value that is not finite",
        ),
        (lambda p: p.log_prob(torch.zeros(1, 16), steps=0), "steps: at least 1"),
        (lambda p: p.log_prob(torch.zeros(1, 16), probes=-1), "probes: at least 1"),
        (lambda p: p.log_prob(torch.zeros(1, 16), layer=2), r"layer: this prior models 0 \(got 2\)"),
        (lambda p: p.log_prob(torch.zeros(2, 16), ids=[1, 2, 3]), "ids: expected 2 integers"),
        (lambda p: p.denoise(torch.zeros(1, 16), u=1.1), "u: a noise level"),
        (lambda p: p.denoise(torch.zeros(1, 16), mode="other"), "mode: 'sample' or 'mean'"),
        (lambda p: p.encode(torch.zeros(1, 16), block=2), "block: this prior has blocks 0 to 1"),
        (lambda p: p.sample(0), "n: at least 1"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(UserError, match=says):
        call(trained_like_prior())
