"""The closed forms at every noise level against dense Gaussians and autograd, in float64 and float32."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dmm_ray.gaussians import GaussianMixture

K, D = 5, 6


def made(rank: int, rotated: bool, d: int = D, seed: int = 0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return GaussianMixture(
        normal(K).softmax(0),
        2 * normal(K, d),
        normal(K, d).square() + 0.05,
        normal(K, rank, d) if rank else None,
        torch.linalg.qr(normal(d, d)).Q if rotated else None,
    )


def dense(mixture: GaussianMixture, u: float) -> MixtureSameFamily:
    """The distribution of ``z_u`` with whole covariance matrices in the rows' own axes."""
    a, d = 1 - u, mixture.means.shape[1]
    basis = torch.eye(d, dtype=torch.float64) if mixture.basis is None else mixture.basis
    own = torch.diag_embed(mixture.variances) + mixture.factors.mT @ mixture.factors
    covariance = a * a * basis @ own @ basis.T + u * u * torch.eye(d, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(a * mixture.means @ basis.T, covariance)
    )


def rows(n: int = 7, d: int = D) -> Tensor:
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SHAPES = pytest.mark.parametrize(
    ("rank", "rotated"), [(0, False), (0, True), (3, True)], ids=["own axes", "rotated", "factors"]
)


@SHAPES
@pytest.mark.parametrize("u", [0.0, 0.02, 0.4, 0.9, 1.0])
def test_log_density_velocity_and_posterior_mean_are_those_of_dense_gaussians(rank, rotated, u) -> None:
    mixture, z = made(rank, rotated), rows().requires_grad_()
    log_prob = dense(mixture, u).log_prob(z)
    assert torch.allclose(mixture.at(u).log_prob(z), log_prob)
    (score,) = torch.autograd.grad(log_prob.sum(), z)
    if 0 < u < 1:  # Tweedie's formula (Efron 2011) has no value at the ends
        clean = (z + u * u * score) / (1 - u)
        assert torch.allclose(mixture.posterior_mean(z, u), clean)
        assert torch.allclose(mixture.velocity(z, u), (z - clean) / u)


@SHAPES
@pytest.mark.parametrize("u", [0.0, 0.02, 0.4, 0.9, 1.0])
def test_divergence_is_the_trace_of_the_jacobian_by_autograd(rank, rotated, u) -> None:
    mixture, z = made(rank, rotated), rows()
    velocity, divergence = mixture.at(u).velocity_and_divergence(z)
    assert torch.allclose(velocity, mixture.velocity(z, u))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: mixture.at(u).velocity(row[None])[0]))(z)
    assert torch.allclose(divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1))


@SHAPES
def test_both_ends_are_exact(rank, rotated) -> None:
    mixture, z = made(rank, rotated), rows()
    mean = dense(mixture, 0.0).mean
    assert torch.allclose(mixture.velocity(z, 0.0), -z)
    assert torch.allclose(mixture.posterior_mean(z, 0.0), z)
    assert torch.allclose(mixture.velocity(z, 1.0), z - mean)
    assert torch.allclose(mixture.posterior_mean(z, 1.0), mean.expand_as(z))


@SHAPES
def test_float32_agrees_with_float64_far_out_and_at_small_variances(rank, rotated) -> None:
    exact = made(rank, rotated, d=48)
    exact = GaussianMixture(
        exact.weights, exact.means, exact.variances * 1e-2, exact.factors, exact.basis
    ).double()
    z = torch.cat([exact.sample(40), 20 * rows(10, d=48)])
    rough = made(rank, rotated, d=48).float()
    rough.variances.mul_(1e-2)
    for u in (0.01, 0.3, 0.95):
        velocity, divergence = exact.at(u).velocity_and_divergence(z)
        got, got_divergence = rough.at(u).velocity_and_divergence(z.float())
        assert torch.allclose(got.double(), velocity, rtol=1e-3, atol=1e-3 * float(velocity.abs().max()))
        assert torch.allclose(got_divergence.double(), divergence, rtol=1e-3, atol=1e-3 * 48 / u)
    assert torch.allclose(rough.log_prob(z.float()).double(), exact.log_prob(z), rtol=1e-6, atol=0.1)


def test_rows_of_mixed_levels_equal_rows_one_level_at_a_time_in_any_company() -> None:
    mixture, z = made(3, True), rows(40)
    u = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64).repeat(10)
    got = mixture.velocity(z, u)
    for i in range(40):
        assert torch.allclose(got[i : i + 1], mixture.velocity(z[i : i + 1], float(u[i])))


@SHAPES
def test_samples_have_the_moments_of_the_mixture_and_follow_the_seed(rank, rotated) -> None:
    mixture = made(rank, rotated)
    drawn, basis = mixture.sample(60_000, seed=3), dense(mixture, 0.0)
    assert torch.allclose(drawn.mean(0), basis.mean, atol=0.05)
    assert torch.allclose(drawn.var(0), basis.variance, rtol=0.03)
    assert torch.equal(mixture.sample(9, seed=3), mixture.sample(9, seed=3))
    assert not torch.equal(mixture.sample(9, seed=3), mixture.sample(9, seed=4))


def test_parts_of_chosen_components_are_columns_of_all() -> None:
    mixture, z = made(3, True), rows()
    noised, turned = mixture.at(0.3), mixture.rotated(z)
    diagonal, every = noised.diagonal_part(turned), noised.log_joint(z)
    for k in range(K):
        assert torch.allclose(diagonal[:, k] + noised.factor_part_of(k, turned), every[:, k])
    near = torch.tensor([[0, 3]] * 7)
    assert torch.allclose(noised.diagonal_part_of(near, turned), diagonal.gather(1, near))
    assert torch.equal(noised.component(z), every.argmax(1))


def test_size_and_cost_count_everything() -> None:
    assert made(0, False).n_parameters == K - 1 + 2 * K * D
    assert made(3, True).n_parameters == K - 1 + 5 * K * D + D * (D - 1) // 2
    assert made(0, False).flops_per_row == 8 * K * D
    assert made(3, True).flops_per_row == K * D * (8 + 12) + 4 * D * D


def test_a_saved_state_gives_the_same_mixture() -> None:
    mixture, other = made(3, True), made(3, True, seed=9)
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.velocity(rows(), 0.4), mixture.velocity(rows(), 0.4))
