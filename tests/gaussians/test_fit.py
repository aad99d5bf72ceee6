"""Fits on planted clusters and factors, and what validation rows choose."""

import logging

import pytest
import torch
from torch import Tensor

from dmm_ray.gaussians import (
    GaussianMixture,
    choose_analysers,
    choose_diagonal,
    find_clusters,
    fit_analysers,
    fit_diagonal,
    flow_matching_loss,
)
from dmm_ray.gaussians.assign import SCORED_COMPONENTS, likeliest
from dmm_ray.gaussians.clusters import gather, kmeans
from dmm_ray.gaussians.diagonal import from_sums

CENTRES = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [-4.0, -4.0, 0]])
SPREADS = torch.tensor([0.3, 0.5, 0.7, 0.4])


def planted(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (n,), generator=g)
    return CENTRES[which] + torch.randn(n, 3, generator=g) * SPREADS[which, None]


def true_mixture() -> GaussianMixture:
    return GaussianMixture(torch.full((4,), 0.25), CENTRES, SPREADS.square()[:, None].repeat(1, 3))


def factored(components: int = 6, d: int = 24, rank: int = 3) -> GaussianMixture:
    """Factor analysers whose factors are as large as the distances between them."""
    g = torch.Generator().manual_seed(4)
    return GaussianMixture(
        torch.full((components,), 1 / components),
        1.5 * torch.randn(components, d, generator=g),
        torch.full((components, d), 0.05),
        torch.randn(components, rank, d, generator=g),
    )


def fitted(z: Tensor, k: int, seed: int = 0, **options: object) -> GaussianMixture:
    return fit_diagonal(z, find_clusters(z, k, seed), **options)


def test_one_component_is_the_diagonal_gaussian() -> None:
    z = torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1, 2, 3]) + 1
    mixture = fitted(z, 1, rotated=False)
    assert torch.allclose(mixture.means[0], z.mean(0), atol=1e-4)
    assert torch.allclose(mixture.variances[0], z.var(0, correction=0), rtol=1e-3)
    assert mixture.basis is None


def test_one_rotated_component_is_the_full_gaussian() -> None:
    z = torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        4, 4, generator=torch.Generator().manual_seed(1)
    )
    mixture = fitted(z, 1)
    expected = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    assert torch.allclose(mixture.log_prob(z[:100]), expected.log_prob(z[:100]), atol=0.02)


def test_planted_clusters_are_found_and_give_the_loss_of_the_truth() -> None:
    mixture, fresh, truth = fitted(planted(20_000), 12, em_steps=5), planted(20_000, seed=9), true_mixture()
    means = mixture.means @ mixture.basis.T
    assert (torch.cdist(CENTRES, means).min(1).values < 0.8).all()
    assert flow_matching_loss(mixture, fresh) == pytest.approx(flow_matching_loss(truth, fresh), rel=0.03)
    expected = float(truth.log_prob(fresh).mean())
    assert float(mixture.log_prob(fresh).mean()) == pytest.approx(expected, abs=0.15)


def test_the_maximisation_recovers_the_truth_from_good_responsibilities() -> None:
    z = planted(20_000)
    mixture = from_sums(gather(z, true_mixture().at(0.0).component(z), 4))
    assert torch.allclose(mixture.means, CENTRES, atol=0.03)
    assert torch.allclose(mixture.variances, true_mixture().variances, rtol=0.1)
    assert torch.allclose(mixture.weights, torch.full((4,), 0.25), atol=0.02)


def test_em_raises_the_likelihood_of_its_rows() -> None:
    z = torch.randn(6_000, 5, generator=torch.Generator().manual_seed(1)).exp()
    clusters = find_clusters(z, 24)
    scores = [float(fit_diagonal(z, clusters, em_steps=steps).log_prob(z).mean()) for steps in (0, 1, 3, 8)]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.05


def test_planted_factors_are_recovered_and_beat_diagonal_gaussians() -> None:
    truth = factored()
    z, fresh = truth.sample(12_000, seed=1), truth.sample(4_000, seed=2)
    clusters = find_clusters(z, 6)
    mixture = fit_analysers(z, clusters, rank=3, pooled_rows=1.0, em_steps=6)
    expected = float(truth.log_prob(fresh).mean())
    assert float(mixture.log_prob(fresh).mean()) == pytest.approx(expected, abs=0.15)
    assert flow_matching_loss(mixture, fresh) < 1.05 * flow_matching_loss(truth, fresh)
    assert flow_matching_loss(mixture, fresh) < 0.8 * flow_matching_loss(fit_diagonal(z, clusters), fresh)


def test_factors_that_the_rows_do_not_support_come_out_as_zero_and_the_rest_stays_diagonal() -> None:
    z = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 8)
    mixture = fit_analysers(z, find_clusters(z, 1), rank=3)
    covariance = torch.diag(mixture.variances[0]) + mixture.factors[0].T @ mixture.factors[0]
    turned = mixture.basis @ covariance @ mixture.basis.T
    assert torch.allclose(turned, z.T.cov(correction=0), atol=0.15)


@pytest.mark.parametrize("rank", [0, 2])
def test_ranking_components_first_finds_the_likeliest_of_many(rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    k, d = 800, 120
    model = GaussianMixture(
        torch.full((k,), 1 / k),
        torch.randn(k, d, generator=g),
        torch.rand(k, d, generator=g) + 0.3,
        torch.randn(k, rank, d, generator=g) * 0.3,
        torch.linalg.qr(torch.randn(d, d, generator=g)).Q,
    )
    z = model.sample(3_000)
    exact = model.at(0.0).log_joint(z)
    found = exact.gather(1, likeliest(model)(z)[:, None])[:, 0]
    assert k > SCORED_COMPONENTS
    assert float((found >= exact.max(1).values - 1e-2).float().mean()) > 0.97


def test_validation_rows_choose_the_size_and_stop_where_it_gets_worse() -> None:
    chosen = choose_diagonal(planted(3_000), planted(1_500, seed=5), [64, 1, 8, 150])
    assert list(chosen.losses)[:3] == ["1", "8", "64"]
    best = min(chosen.losses, key=chosen.losses.__getitem__)
    assert str(chosen.mixture.components) == best.split()[0]
    assert chosen.losses["1"] > 1.2 * chosen.losses["8"]
    assert chosen.mixture.seconds > 0
    assert chosen.lowered is None


def test_rotated_clusters_choose_the_rotation() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    stretched = planted(4_000) * torch.tensor([1.0, 1.0, 0.1])
    centred = stretched + torch.randn(4_000, 1, generator=torch.Generator().manual_seed(1)) * 2
    chosen = choose_diagonal(centred @ turn, (centred @ turn)[:1000], [4])
    assert chosen.mixture.basis is not None


def test_validation_rows_choose_size_and_rank_of_analysers() -> None:
    truth = factored()
    chosen = choose_analysers(truth.sample(6_000, seed=1), truth.sample(1_000, seed=2), [1, 6], [1, 3])
    assert set(chosen.losses) == {"1 x 1", "6 x 1", "6 x 3"}
    assert (chosen.mixture.components, chosen.mixture.rank) == (6, 3)


def test_more_components_than_the_rows_allow_are_lowered_and_said(caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="dmm_ray"):
        chosen = choose_diagonal(planted(200), planted(100, seed=1), [4, 500, 1000])
    assert chosen.lowered == 10
    assert set(chosen.losses) <= {"4", "10", "4 in the rows' own axes", "10 in the rows' own axes"}
    assert "more than 10 components" in caplog.text
    with caplog.at_level(logging.WARNING, logger="dmm_ray"):
        few = choose_analysers(planted(15), planted(15, seed=1), [64], [2])
    assert few.mixture.components == 1
    assert few.mixture.velocity(planted(5), 0.5).isfinite().all()


@pytest.mark.parametrize("rank", [0, 2])
def test_repeated_rows_and_constant_dimensions_stay_finite(rank: int) -> None:
    z = torch.cat([planted(30).repeat(3, 1), torch.zeros(90, 1)], dim=1)
    clusters = find_clusters(z, 40)
    mixture = fit_analysers(z, clusters, rank) if rank else fit_diagonal(z, clusters)
    assert mixture.log_prob(z).isfinite().all()
    assert mixture.velocity(z, 0.5).isfinite().all()


def test_kmeans_moves_centres_that_lose_all_rows() -> None:
    z = torch.cat([torch.zeros(10, 2), planted(500)[:, :2]])
    assert len(kmeans(z, 10, steps=10).unique(dim=0)) > 5


def test_fit_is_a_function_of_the_seed() -> None:
    z = planted(2_000)
    assert torch.equal(fitted(z, 8, seed=1).means, fitted(z, 8, seed=1).means)
    assert not torch.equal(fitted(z, 8, seed=1).means, fitted(z, 8, seed=2).means)
    a, b = (fit_analysers(z, find_clusters(z, 4), 1, seed=3) for _ in range(2))
    assert torch.equal(a.factors, b.factors)


def test_loss_of_the_true_mixture_falls_with_what_is_known() -> None:
    fresh = planted(4_000, seed=2)
    everything = GaussianMixture(torch.ones(1), fresh.mean(0)[None], fresh.var(0)[None])
    assert flow_matching_loss(true_mixture(), fresh) < flow_matching_loss(everything, fresh)
