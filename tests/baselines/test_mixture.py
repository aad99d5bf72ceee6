"""The mixture against one Gaussian, planted clusters, scipy-free closed forms and its own density."""

import pytest
import torch

from dmm_ray.baselines import Gaussian, Mixture, fit_best, validation_loss
from dmm_ray.baselines.mixture import kmeans

CENTRES = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [-4.0, -4.0, 0]])
SPREADS = torch.tensor([0.3, 0.5, 0.7, 0.4])


def planted(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (n,), generator=g)
    return CENTRES[which] + torch.randn(n, 3, generator=g) * SPREADS[which, None]


def true_mixture() -> Mixture:
    return Mixture(torch.full((4,), 0.25), CENTRES, SPREADS.square()[:, None].repeat(1, 3))


def test_one_component_is_the_diagonal_gaussian() -> None:
    z = torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1, 2, 3]) + 1
    mixture = Mixture.fit(z, 1)
    mean, var = z.double().mean(0), z.double().var(0, unbiased=False)
    gaussian = Gaussian(mean, var, torch.eye(4, dtype=torch.float64))
    u = torch.linspace(0, 1, 100)
    assert torch.allclose(mixture.velocity(z[:100], u), gaussian.velocity(z[:100], u), atol=1e-3)
    assert torch.allclose(mixture.posterior_mean(z[:100], u), gaussian.posterior_mean(z[:100], u), atol=1e-3)
    assert torch.allclose(mixture.log_prob(z[:100]).double(), gaussian.log_prob(z[:100]), atol=1e-3)


def test_planted_clusters_are_found_and_give_the_loss_of_the_truth() -> None:
    mixture = Mixture.fit(planted(20_000), 12, em_steps=5)
    fresh = planted(20_000, seed=9)
    assert (torch.cdist(CENTRES, mixture.means).min(1).values < 0.8).all()
    truth = true_mixture()
    assert validation_loss(mixture, fresh) == pytest.approx(validation_loss(truth, fresh), rel=0.03)
    assert float(mixture.log_prob(fresh).mean()) == pytest.approx(
        float(truth.log_prob(fresh).mean()), abs=0.15
    )


def test_four_components_from_good_centres_recover_the_truth() -> None:
    z = planted(20_000)
    mixture = true_mixture().em_step(z)
    assert torch.allclose(mixture.means, CENTRES, atol=0.03)
    assert torch.allclose(mixture.variances, true_mixture().variances, rtol=0.1)
    assert torch.allclose(mixture.weights, torch.full((4,), 0.25), atol=0.02)


def test_em_raises_the_likelihood_of_its_rows() -> None:
    z = torch.randn(6_000, 5, generator=torch.Generator().manual_seed(1)).exp()
    scores = [float(Mixture.fit(z, 24, em_steps=steps).log_prob(z).mean()) for steps in (0, 1, 3, 8)]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.05


def test_velocity_is_tweedies_formula_with_the_score_by_autograd() -> None:
    mixture, u = true_mixture(), 0.35
    parts = torch.distributions.Independent(
        torch.distributions.Normal((1 - u) * CENTRES, ((1 - u) ** 2 * mixture.variances + u * u).sqrt()), 1
    )
    noised = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), parts)
    z = (planted(200) * (1 - u)).requires_grad_()
    (score,) = torch.autograd.grad(noised.log_prob(z).sum(), z)
    x0 = (z + u * u * score) / (1 - u)
    got = mixture.posterior_mean(z.detach(), u)
    assert torch.allclose(got, x0.detach(), atol=1e-3)
    assert torch.allclose(mixture.velocity(z.detach(), u), ((z - x0) / u).detach(), atol=5e-3)


def test_rows_of_mixed_levels_equal_rows_one_level_at_a_time() -> None:
    mixture, z = true_mixture(), planted(40)
    u = torch.tensor([0.0, 0.2, 0.7, 1.0]).repeat(10)
    got = mixture.velocity(z, u)
    for level in u.unique():
        assert torch.allclose(got[u == level], mixture.velocity(z[u == level], float(level)), atol=1e-5)
    assert torch.allclose(got[u == 0], -z[u == 0], atol=1e-4)


def test_samples_come_from_the_mixture() -> None:
    drawn = true_mixture().sample(20_000, seed=2)
    share = torch.bincount(torch.cdist(drawn, CENTRES).argmin(1), minlength=4) / len(drawn)
    assert torch.allclose(share, torch.full((4,), 0.25), atol=0.02)
    assert torch.allclose(drawn.mean(0), CENTRES.mean(0), atol=0.1)


def test_validation_rows_choose_the_size() -> None:
    best, losses = fit_best(planted(3_000), planted(1_500, seed=5), [1, 8, 64])
    assert set(losses) == {1, 8, 64}
    assert losses[best.components if best.components in losses else 8] == min(losses.values())
    assert losses[1] > 1.2 * losses[8]
    assert best.seconds > 0


def test_more_components_than_rows_and_repeated_rows_stay_finite() -> None:
    z = planted(30).repeat(3, 1)
    mixture = Mixture.fit(z, 500)
    assert mixture.components <= 90
    assert mixture.log_prob(z).isfinite().all()
    assert mixture.velocity(z, 0.5).isfinite().all()


def test_kmeans_moves_centres_that_lose_all_rows() -> None:
    z = torch.cat([torch.zeros(10, 2), planted(500)[:, :2]])
    centres = kmeans(z, 10, steps=10)
    assert len(centres.unique(dim=0)) > 5


def test_fit_is_a_function_of_the_seed() -> None:
    z = planted(2_000)
    assert torch.equal(Mixture.fit(z, 8, seed=1).means, Mixture.fit(z, 8, seed=1).means)
    assert not torch.equal(Mixture.fit(z, 8, seed=1).means, Mixture.fit(z, 8, seed=2).means)
