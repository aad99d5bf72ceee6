"""Against zuko's continuous normalizing flows: adaptive steps, a trace by automatic differentiation."""

import pytest
import torch

from dmm_ray.prior import ActivationPrior, PriorConfig

zuko = pytest.importorskip("zuko")
D = 6


def test_log_prob_and_latents_agree_with_zuko():
    config = PriorConfig(d=D, layers=(0,), d_model=32, d_mlp=48, n_blocks=2, variance_floor=1e-6)
    mean, var = torch.linspace(-2, 2, D), torch.linspace(0.5, 3, D)
    prior = ActivationPrior.untrained(config, mean, var, seed=3)
    torch.manual_seed(0)
    x = torch.randn(12, D) * var.sqrt() + mean
    ours = prior.log_prob(x, probes=0, steps=400)
    flow = zuko.transforms.FreeFormJacobianTransform(
        lambda u, z: prior.velocity(z, u), 0.0, 1.0, atol=1e-6, rtol=1e-6
    )
    with torch.no_grad():
        z_1, divergence = flow.call_and_ladj((x - mean) / var.sqrt())
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z_1).sum(1)
    assert (ours.base - base).abs().max() < 2e-3
    assert (ours.divergence - divergence).abs().max() < 2e-3
    assert (ours.nats - (base + divergence - 0.5 * var.log().sum())).abs().max() < 3e-3
    assert divergence.std() > 0.02  # there is something to agree on
