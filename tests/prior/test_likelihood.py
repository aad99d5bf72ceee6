import math

import pytest
import torch
from gaussians import PowerLawVelocity, gaussian_prior, power_law, power_law_prior, random_covariance
from scipy.stats import spearmanr
from torch.distributions import MultivariateNormal

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig, Solver
from dmm_ray.prior.noise import DRAW, STREAM_PAIRS, normal, rademacher

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
    z, solver = gaussian_rows(50, covariance), Solver()

    def velocity(s, u):
        return prior.velocity(s, u)

    noise = solver.integrate(velocity, z, solver.points(0, 1, 64))
    assert (noise.std() - 1).abs() < 0.15
    assert (solver.integrate(velocity, noise, solver.points(1, 0, 64)) - z).abs().max() < 0.01


@pytest.mark.parametrize("probes", [2, 4])
def test_standard_errors_cover_the_exact_value(probes):
    """Errors over standard errors, of 100 rows under 40 names each, have unit variance and normal tails.

    A variance from K probes has K - 1 degrees of freedom at each of the 32 evaluations, but their sum has about
    32 (K - 1) of them: the ratio is close to normal even with two probes.
    """
    prior = trained_like_prior()
    torch.manual_seed(0)
    x = torch.randn(100, 16)
    exact = prior.log_prob(x, probes=0, steps=32).nats.repeat(40)
    estimate = prior.log_prob(x.repeat(40, 1), probes=probes, steps=32)
    ratios = ((estimate.nats - exact) / estimate.stderr).double()
    n = ratios.numel()
    # chi-square bounds at five standard deviations; the slack covers the spread of the variance estimates themselves
    assert ratios.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / n) + 3 / (32 * (probes - 1)))
    assert ratios.mean().abs() < 5 / math.sqrt(n)
    assert (ratios.abs() < 1.96).double().mean() == pytest.approx(0.95, abs=0.02)


def test_held_probes_would_be_worse():
    """What fresh probes gain: the same probe at all evaluations gives several times the spread."""
    prior = trained_like_prior()
    torch.manual_seed(0)
    x, ids = torch.randn(400, 16), torch.arange(400)
    exact = prior.log_prob(x, probes=0, steps=16).nats
    fresh = (prior.log_prob(x, probes=1, steps=16).nats - exact).std()
    field, solver = prior.velocities.field(prior.denoiser, 0), Solver()
    signs = rademacher(0, ids, 16)[None]

    def held(z, u, number):
        v, along = field.network_tangents(z, u, signs)
        return v, (along[0] * signs[0]).sum(1), torch.zeros(len(z))

    z_1, divergence, _ = solver.integrate_with_trace(field, held, x, solver.points(0, 1, 16))
    base = -0.5 * z_1.double().square().sum(1) - 8 * math.log(2 * math.pi)
    assert (base + divergence - exact).std() > 2 * fresh


def test_every_solver_converges_to_the_closed_form():
    covariance = random_covariance(D)
    prior, x = gaussian_prior(covariance), gaussian_rows(50, covariance)
    exact = MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance).log_prob(x.double())
    for method, bound in (("euler", 1.0), ("midpoint", 2e-3), ("heun", 6e-3), ("rk4", 1e-4)):
        result = prior.log_prob(x, probes=0, steps=128, solver=Solver(method))
        assert (result.nats - exact).abs().max() < bound, method
        assert result.evaluations == 128 * Solver(method).stages


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_closed_form_at_large_width(exponent):
    """d = 4096, a power-law spectrum, 64 evaluations: error spread within 1 nat, bias within 0.005 nats a dimension."""
    d, values = 4096, power_law(4096, exponent)
    x = (normal(0, torch.arange(64), d) * values.sqrt()).float()
    exact = -0.5 * (x.double().square() / values + values.log() + math.log(2 * math.pi)).sum(1)
    field = power_law_prior(values).velocities.field(PowerLawVelocity(values), 0)
    solver = Solver()

    def traced(z, u, number):
        slopes = PowerLawVelocity(values).gates(torch.tensor([u]))[0]
        return field(z, u), slopes.sum().expand(len(z)), torch.zeros(len(z))

    z_1, divergence, _ = solver.integrate_with_trace(field, traced, x, solver.points(0, 1, 32))
    error = -0.5 * (z_1.double().square() + math.log(2 * math.pi)).sum(1) + divergence - exact
    assert error.std() < 1
    assert error.mean().abs() / d < 0.005


def test_exact_trace_beyond_the_limit_only_if_insisted_on():
    values = power_law(600)
    prior, x = power_law_prior(values), torch.randn(2, 600) * values.sqrt().float()
    with pytest.raises(UserError, match="exact_limit=600 to allow it"):
        prior.log_prob(x, probes=0)
    exact = -0.5 * (x.double().square() / values + values.log() + math.log(2 * math.pi)).sum(1)
    found = prior.log_prob(x, probes=0, steps=32, exact_limit=600).nats
    assert (found - exact).abs().max() / 600 < 0.005


def test_bfloat16_is_close_and_differs():
    prior = trained_like_prior()
    torch.manual_seed(0)
    x = torch.randn(200, 16)
    full, half = prior.log_prob(x, probes=0), prior.log_prob(x, probes=0, precision="bfloat16")
    assert half.nats.dtype == torch.float32
    error = (half.nats - full.nats).abs()
    assert 0 < error.mean() < 0.05
    with pytest.raises(UserError, match="precision: expected auto, float32 or bfloat16"):
        prior.log_prob(x, precision="float16")


def test_velocity_error_ranks_rows_as_their_likelihood_does():
    covariance = random_covariance(D)
    prior = gaussian_prior(covariance)
    x = torch.cat([gaussian_rows(300, covariance), 3 * torch.randn(50, D), gaussian_rows(50, covariance) * 2])
    exact = prior.log_prob(x, probes=0).nats
    proxy = prior.velocity_error(x, pairs=16)
    assert proxy.shape == (400,)
    assert spearmanr(-proxy, exact).statistic > 0.85


def test_velocity_error_is_the_loss():
    covariance = random_covariance(D)
    prior, x = gaussian_prior(covariance), gaussian_rows(5, covariance)
    expected = torch.zeros(5)
    for k in range(2):
        noise, u = normal(7, torch.arange(5), D, STREAM_PAIRS + k * DRAW), (k + 0.5) / 2
        expected += (prior.velocity((1 - u) * x + u * noise, u) - (noise - x)).square().mean(1) / 2
    assert torch.allclose(prior.velocity_error(x, pairs=2, seed=7), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.log_prob(torch.zeros(2, 15)), r"expected shape \(n, 16\), got \(2, 15\)"),
        (lambda p: p.log_prob(torch.zeros(0, 16)), "at least one row"),
        (
            lambda p: p.log_prob(torch.tensor([[0.0] * 16, [float("nan")] * 16])),
            "row 1 contains NaN or Inf",
        ),
        (lambda p: p.log_prob(torch.zeros(1, 16), steps=0), "steps: at least 1"),
        (lambda p: p.log_prob(torch.zeros(1, 16), probes=-1), "probes: at least 1"),
        (lambda p: p.log_prob(torch.zeros(1, 16), layer=2), r"layer: this prior models 0 \(got 2\)"),
        (lambda p: p.log_prob(torch.zeros(2, 16), ids=[1, 2, 3]), "ids: expected 2 integers"),
        (lambda p: p.log_prob(torch.full((1, 16), 1e300, dtype=torch.float64)), "row 0 contains NaN or Inf"),
        (
            lambda p: p.denoise(torch.full((1, 16), math.inf), ids=[[4, 7]]),
            r"row 0 \(id 4, 7\) contains NaN or Inf",
        ),
        (lambda p: p.log_prob([["a"]]), "activations: expected numbers"),
        (lambda p: p.denoise(torch.zeros(1, 16), u=1.1), "u: expected a noise level"),
        (lambda p: p.denoise(torch.zeros(1, 16), u=math.nan), "u: expected a noise level"),
        (
            lambda p: p.denoise(torch.zeros(2, 16), u=torch.tensor([0.5, -0.1])),
            r"u: expected a noise level .* \(got -0.1\)",
        ),
        (lambda p: p.denoise(torch.zeros(2, 16), u=torch.ones(3)), "u: expected one noise level or one per"),
        (lambda p: p.denoise(torch.zeros(2, 16), steps=0), "steps: at least 1"),
        (lambda p: p.denoise(torch.zeros(2, 16), steps=0, mode="mean"), "steps: at least 1"),
        (lambda p: p.level_for_distance(torch.zeros(2, 16), math.nan), "distance: expected a finite number"),
        (lambda p: p.level_for_distance(torch.zeros(2, 16), -1), "distance: expected a finite number"),
        (lambda p: p.velocity_error(torch.zeros(2, 16), pairs=0), "pairs: at least 1"),
        (lambda p: p.encode(torch.zeros(2, 16), noises=0), "noises: at least 1"),
        (lambda p: p.encode(torch.zeros(2, 16), u=-1), "u: expected a noise level"),
        (lambda p: p.sample(2, steps=0), "steps: at least 1"),
        (lambda p: p.velocity(torch.zeros(2, 16), 1.5), "u: expected a noise level"),
        (lambda p: p.velocity(torch.zeros(2, 15), 0.5), r"z: expected shape \(n, 16\)"),
        (lambda p: p.denoise(torch.zeros(1, 16), mode="other"), "mode: expected 'sample' or 'mean'"),
        (lambda p: p.encode(torch.zeros(1, 16), block=2), "block: this prior has blocks 0 to 1"),
        (lambda p: p.sample(0), "n: at least 1"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(UserError, match=says):
        call(trained_like_prior())
