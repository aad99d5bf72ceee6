"""Closed forms of the linear baselines, against theory and against plain regression on samples."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from dmm_ray.baselines import PCA, Gaussian
from dmm_ray.gaussians import flow_matching_loss


def correlated(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) * torch.linspace(0.2, 1.5, d)
    return torch.randn(n, d, generator=g) @ mix + torch.linspace(-1, 1, d)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return correlated(40_000)


@pytest.mark.parametrize("u", [0.1, 0.5, 0.9])
def test_velocity_is_the_regression_of_noise_minus_z_on_the_noised_row(rows: torch.Tensor, u: float) -> None:
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    z_u, target = (1 - u) * rows + u * noise, noise - rows
    design = torch.cat([z_u, torch.ones(len(z_u), 1)], dim=1).double()
    fitted = design @ torch.linalg.lstsq(design, target.double()).solution
    got = Gaussian.fit(rows).velocity(z_u, u).double()
    assert (got - fitted).square().mean() < 2e-3 * target.var()


@pytest.mark.parametrize("u", [0.05, 0.5, 0.95])
def test_loss_equals_the_trace_formula_on_own_samples(rows: torch.Tensor, u: float) -> None:
    model = Gaussian.fit(rows)
    z = model.sample(60_000, seed=3)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    error = (model.velocity((1 - u) * z + u * noise, u) - (noise - z)).square().mean()
    assert float(error) == pytest.approx(model.loss(u), rel=0.02)


def test_velocity_is_exact_at_both_ends_and_agrees_with_the_posterior_mean_between(
    rows: torch.Tensor,
) -> None:
    model, z = Gaussian.fit(rows), rows[:50]
    assert torch.allclose(model.velocity(z, 0.0), -z, atol=1e-5)
    assert torch.allclose(model.velocity(z, 1.0), z - model.mean.float(), atol=1e-5)
    assert torch.allclose(model.posterior_mean(z, 1.0), model.mean.float().expand_as(z), atol=1e-5)
    u = torch.linspace(0.02, 0.98, 50)
    assert torch.allclose(model.posterior_mean(z, u), z - u[:, None] * model.velocity(z, u), atol=1e-4)


def test_posterior_mean_is_tweedies_formula_with_the_score_by_autograd(rows: torch.Tensor) -> None:
    """``E[z | z_u] = (z_u + u^2 grad log p_u(z_u)) / (1 - u)`` (Efron 2011)."""
    model, u = Gaussian.fit(rows), 0.4
    covariance = (model.vectors * ((1 - u) ** 2 * model.values + u * u)) @ model.vectors.T
    noised = torch.distributions.MultivariateNormal((1 - u) * model.mean, covariance)
    z = rows[:20].double().requires_grad_()
    (score,) = torch.autograd.grad(noised.log_prob(z).sum(), z)
    expected = (z + u * u * score) / (1 - u)
    assert torch.allclose(model.posterior_mean(z.detach(), u), expected.detach(), atol=1e-4)


def test_log_prob_is_scipys(rows: torch.Tensor) -> None:
    model = Gaussian.fit(rows)
    covariance = (model.vectors * model.values) @ model.vectors.T
    expected = multivariate_normal(model.mean.numpy(), covariance.numpy()).logpdf(rows[:100].numpy())
    assert torch.allclose(model.log_prob(rows[:100]), torch.from_numpy(expected), atol=1e-3)


def test_samples_have_the_fitted_moments_and_follow_the_seed(rows: torch.Tensor) -> None:
    model = Gaussian.fit(rows)
    drawn = model.sample(100_000, seed=1)
    assert torch.allclose(drawn.mean(0), rows.mean(0), atol=0.05)
    assert torch.allclose(drawn.T.cov(), rows.T.cov(), rtol=0.05, atol=0.1)
    assert torch.equal(drawn, model.sample(100_000, seed=1))
    assert not torch.equal(drawn, model.sample(100_000, seed=2))


def test_constant_dimension_is_floored_not_singular() -> None:
    z = correlated(500)
    z[:, 2] = 0.0
    model = Gaussian.fit(z)
    assert model.log_prob(z).isfinite().all()
    assert model.velocity(z, 0.001).isfinite().all()


def test_pca_with_all_components_is_the_gaussian(rows: torch.Tensor) -> None:
    pca, gaussian = PCA.fit(rows, share=1.0), Gaussian.fit(rows)
    z, u = rows[:64], torch.linspace(0.05, 1, 64)
    assert pca.components == 6
    assert torch.allclose(pca.posterior_mean(z, u), gaussian.posterior_mean(z, u), atol=1e-4)
    assert torch.allclose(pca.velocity(z, u), gaussian.velocity(z, u), atol=1e-3)
    assert torch.allclose(pca.reconstruct(z), z, atol=1e-4)


def test_pca_keeps_the_fewest_components_that_hold_the_share() -> None:
    scale = torch.tensor([10.0, 3.0, 1.0, 0.1])
    z = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * scale
    assert [PCA.fit(z, share).components for share in (0.5, 0.95, 0.995, 0.9999999)] == [1, 2, 3, 4]


def test_pca_leaves_the_mean_outside_its_span() -> None:
    z = torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 5.0, 0.5]) + 2
    pca = PCA.fit(z)
    assert pca.components == 2
    assert (pca.sample(100)[:, 2] - z[:, 2].mean()).abs().max() < 0.05
    assert (pca.posterior_mean(z[:50], 0.3)[:, 2] - z[:, 2].mean()).abs().max() < 0.3


def test_flow_matching_loss_of_the_true_gaussian_is_the_mean_of_its_formula(rows: torch.Tensor) -> None:
    model = Gaussian.fit(rows)
    expected = sum(model.loss((k + 0.5) / 50) for k in range(50)) / 50
    assert flow_matching_loss(model, model.sample(40_000)) == pytest.approx(expected, rel=0.02)


def test_parameters_are_those_of_mean_and_covariance(rows: torch.Tensor) -> None:
    assert Gaussian.fit(rows).n_parameters == 6 + 21
    assert Gaussian.fit(rows).flops_per_row == 4 * 36
    assert math.isfinite(Gaussian.fit(rows).seconds)
