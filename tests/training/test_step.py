import math

import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.prior.network import Denoiser
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.parallel import ParallelDenoiser, RankInfo
from dmm_ray.training.step import Ema, FlowBatch, ema_exponent, learning_rate

CONFIG = TrainConfig(activations="a", out="b", samples=1000 * 64, batch=64, levels_per_batch=16, warmup=0.1)


def test_learning_rate_schedule():
    rates = [learning_rate(CONFIG, 2.0, b) for b in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[100] == pytest.approx(2.0)
    assert max(rates) == rates[100]
    assert rates[550] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[1000] == pytest.approx(0.2)


def test_ema_width_is_the_one_asked_for():
    for sigma in (0.05, 0.1, 0.2):
        gamma = ema_exponent(sigma)
        assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma, rel=1e-6)
    assert ema_exponent(0.1) == pytest.approx(6.94, abs=0.01)


def test_ema_is_the_power_weighted_mean_of_the_weights():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(layer, 0.1)
    n = 400
    for batch in range(1, n + 1):
        with torch.no_grad():
            layer.weight.fill_(batch / n)
        ema.update(batch)
    gamma = ema_exponent(0.1)
    expected = (gamma + 1) / (gamma + 2)  # the mean of t under density (gamma + 1) t^gamma on [0, 1]
    assert float(ema.state()["weight"]) == pytest.approx(expected, abs=0.01)


def test_shares_of_a_batch_hold_the_samples_of_the_whole():
    z = torch.randn(64, 6)
    whole = FlowBatch(CONFIG, 3, slice(0, 64), z)
    for low, high in ((0, 21), (21, 42), (42, 64)):
        part = FlowBatch(CONFIG, 3, slice(low, high), z[low:high])
        assert torch.equal(part.z_u, whole.z_u[low:high])
        assert torch.equal(part.target, whole.target[low:high])


def test_gradient_of_shares_adds_up_to_the_whole():
    torch.manual_seed(0)
    net, z = Denoiser(6, 12, 16, 1), torch.randn(64, 6)

    def gradient(share: slice) -> list[torch.Tensor]:
        data = FlowBatch(CONFIG, 0, share, z[share])
        loss = data.loss(net, False).sum() / 64
        return list(torch.autograd.grad(loss, list(net.parameters())))

    parts = [gradient(slice(0, 10)), gradient(slice(10, 64))]
    for a, b, c in zip(*parts, gradient(slice(0, 64)), strict=True):
        assert torch.allclose(a + b, c, atol=1e-6)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_values_and_gradients_are_those_of_the_plain_formulation(how: str):
    """The time path once per level, compiled or not, against a noise level and a time path for every row."""
    torch.manual_seed(0)
    net, z = Denoiser(6, 12, 16, 1), torch.randn(64, 6)
    data = FlowBatch(CONFIG, 2, slice(0, 64), z)
    model = ParallelDenoiser(
        net, RankInfo(0, 1, torch.device("cpu")), sharded=False, compiled=how == "compiled"
    ).called
    losses = data.loss(model, False)
    gradients = torch.autograd.grad(losses.mean(), list(net.parameters()))
    u_B = data.u_M.repeat_interleave(4)
    plain = (net(data.z_u, u_B) - data.target).square().mean(1)
    assert len(u_B.unique()) > 10
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(plain.mean(), list(net.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compile: .*needs a C"):
        ParallelDenoiser(
            Denoiser(6, 12, 16, 1), RankInfo(0, 1, torch.device("cpu")), sharded=False, compiled=True
        )


def test_levels_must_divide_the_batch():
    with pytest.raises(ValueError, match="levels_per_batch: must divide batch 100"):
        TrainConfig(activations="a", out="b", batch=100, levels_per_batch=64)


def test_every_worker_needs_a_sample():
    with pytest.raises(ValueError, match="batch: 4 workers need a sample each"):
        TrainConfig(activations="a", out="b", batch=3, levels_per_batch=3, workers=4)
