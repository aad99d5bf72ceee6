"""Priors with a closed-form base: the sum of base and network everywhere, exact divergence, folders."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.gaussians import GaussianMixture, fit_gaussian
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.glp_verbs import ExportGlpConfig, export_glp
from dmm_ray.prior.solver import Solver

D, K = 6, 4


def mixture(rank: int = 2, rotated: bool = True) -> GaussianMixture:
    g = torch.Generator().manual_seed(3)
    return GaussianMixture(
        torch.randn(K, generator=g).softmax(0),
        torch.randn(K, D, generator=g),
        torch.rand(K, D, generator=g) + 0.2,
        0.5 * torch.randn(K, rank, D, generator=g) if rank else None,
        torch.linalg.qr(torch.randn(D, D, generator=g)).Q if rotated else None,
    )


def made(base: GaussianMixture, trained: bool = True) -> ActivationPrior:
    """A prior with the base, its network's last layer random as after training, or zero as before."""
    config = PriorConfig(
        d=D, layers=(1,), d_model=16, d_mlp=24, n_blocks=1, variance_floor=1e-6, base="factor_analysers"
    )
    prior = ActivationPrior.untrained(config, torch.full((D,), 0.5), torch.full((D,), 4.0), base=base)
    if trained:
        torch.nn.init.normal_(
            prior.denoiser.out_proj.weight, std=0.1, generator=torch.Generator().manual_seed(5)
        )
    return prior


@pytest.fixture(scope="module")
def prior() -> ActivationPrior:
    return made(mixture())


def rows(n: int = 12) -> Tensor:
    return 2 * torch.randn(n, D, generator=torch.Generator().manual_seed(1)) + 0.5


def test_the_velocity_is_the_base_s_and_the_network_s(prior: ActivationPrior) -> None:
    z, u = rows(), torch.linspace(0, 1, 12)
    assert prior.base is not None
    network = prior.denoiser(z, u, torch.arange(12))
    assert torch.allclose(prior.velocity(z, u), prior.base.velocity(z, u) + network, atol=1e-5)
    for level in (0.0, 0.3, 1.0):
        alone = prior.denoiser(z, torch.tensor([level]))
        expected = prior.base.velocity(z, level) + alone
        assert torch.allclose(prior.velocity(z, level), expected, atol=1e-5)
        field = prior.velocities.field(prior.denoiser, 0, base=prior.base)
        assert torch.allclose(field(z, level), expected, atol=1e-5)


@pytest.mark.parametrize(("rank", "rotated"), [(0, False), (2, True)])
def test_log_prob_is_that_of_the_whole_field_by_autograd(rank: int, rotated: bool) -> None:
    prior, x = made(mixture(rank, rotated)), rows(5)
    found = prior.log_prob(x, steps=4, probes=0)
    z, divergence = prior.normalizer.normalize(x), torch.zeros(5, dtype=torch.float64)

    def trace(z: Tensor, u: float) -> Tensor:
        jacobians = [torch.func.jacrev(lambda r: prior.velocity(r[None], u)[0])(row) for row in z]
        return torch.stack([j.diagonal().sum() for j in jacobians]).double()

    grid = Solver().points(0.0, 1.0, 4)
    for low, high in itertools.pairwise(grid):
        middle = z + (high - low) / 2 * prior.velocity(z, low)
        at = (low + high) / 2
        divergence += (high - low) * trace(middle, at)
        z = z + (high - low) * prior.velocity(middle, at)
    base = -0.5 * (z.double().square().sum(1) + D * math.log(2 * math.pi))
    assert torch.allclose(found.divergence.double(), divergence, atol=2e-4)
    expected = base + divergence + prior.normalizer.log_determinant()
    assert torch.allclose(found.nats.double(), expected, atol=2e-4)


def test_probes_are_spent_on_the_network_alone() -> None:
    """Untrained, the network is zero: the estimate is exact with any probe."""
    prior, x = made(mixture(), trained=False), rows(5)
    exact, estimated = prior.log_prob(x, steps=6, probes=0), prior.log_prob(x, steps=6, probes=2)
    assert torch.allclose(exact.nats, estimated.nats, atol=1e-5)
    assert estimated.stderr is not None
    assert float(estimated.stderr.max()) == 0


def test_over_a_gaussian_base_it_begins_as_that_gaussian() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, D, generator=g) @ torch.randn(D, D, generator=g) / 2 + 1
    gaussian = fit_gaussian(z)
    prior = made(gaussian, trained=False)
    x = prior.normalizer.denormalize(z[:50])
    truth = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    expected = truth.log_prob(z[:50]) + prior.normalizer.log_determinant()
    assert torch.allclose(prior.log_prob(x, steps=128, probes=1).nats, expected, atol=0.02)
    drawn = prior.normalizer.normalize(prior.sample(4000, steps=40))
    assert torch.allclose(drawn.T.cov(), z.T.cov(), atol=0.15 * float(z.T.cov().diagonal().max()))


def test_a_folder_keeps_the_base_and_a_changed_one_is_seen(prior: ActivationPrior, tmp_path: Path) -> None:
    prior.save_pretrained(str(tmp_path))
    again, x = ActivationPrior.from_pretrained(str(tmp_path)), rows()
    assert torch.equal(again.log_prob(x, steps=3).nats, prior.log_prob(x, steps=3).nats)
    assert again.base is not None
    assert torch.equal(again.base.means, prior.base.means)  # type: ignore[union-attr]
    before = again.denoise(x, mode="mean")
    with torch.no_grad():
        again.base.means.add_(1.0)
    assert not torch.allclose(before, again.denoise(x, mode="mean"))
    assert again.fingerprint() != prior.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base.means"), "has no tensor base.means"),
        (
            lambda t: t.update({"base.means": torch.zeros(K, D + 1)}),
            r"means has shape \(4, 7\), expected \(4, 6\)",
        ),
        (lambda t: t.update({"base.basis": torch.zeros(D)}), "base.basis has shape"),
        (lambda t: t.update({"base.variances": torch.zeros(K, D)}), "must be positive"),
        (lambda t: t.update({"base.other": torch.zeros(1)}), "base.other has shape"),
    ],
)
def test_a_damaged_base_is_named(
    prior: ActivationPrior, tmp_path: Path, change: object, message: str
) -> None:
    prior.save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
    change(tensors)  # type: ignore[operator]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{message}"):
        ActivationPrior.from_pretrained(str(tmp_path))


def test_several_layers_and_the_published_format_have_none(prior: ActivationPrior, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="base: not available for a prior of several layers"):
        PriorConfig(d=D, layers=(1, 2), d_model=16, d_mlp=24, n_blocks=1, variance_floor=1e-6, base="mixture")
    prior.save_pretrained(str(tmp_path / "ours"))
    with pytest.raises(UserError, match="factor_analysers base, which the published format cannot hold"):
        export_glp(ExportGlpConfig(prior=str(tmp_path / "ours"), out=str(tmp_path / "theirs")))


def test_a_row_does_not_depend_on_its_batch(prior: ActivationPrior) -> None:
    x, ids = rows(30), torch.arange(30) * 5
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(2))[:7]
    for call in (
        lambda x, ids: prior.log_prob(x, steps=3, ids=ids).nats,
        lambda x, ids: prior.denoise(x, steps=3, ids=ids),
        lambda x, ids: prior.velocity_error(x, ids=ids),
    ):
        assert torch.allclose(call(x, ids)[mixed], call(x[mixed], ids[mixed]), atol=2e-5)
