import math

import torch
from torch.nn import functional as F

from dmm_ray.prior.network import Denoiser, sinusoid


def plain_velocity(
    w: dict, z: torch.Tensor, t: torch.Tensor, depth: torch.Tensor | None, blocks: int
) -> torch.Tensor:
    """The published formula, row by row, from a state dict: an independent implementation."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def waves(x, width):
        freq = torch.tensor([math.exp(-math.log(10000) * i / (width // 2)) for i in range(width // 2)])
        return torch.cat([torch.cos(x[:, None] * freq), torch.sin(x[:, None] * freq)], 1)

    h = linear("in_proj", z)
    e = linear("time_embed.2", F.silu(linear("time_embed.0", waves(t, h.shape[1]))))
    if depth is not None:
        e = e + linear("layer_embed.2", F.silu(linear("layer_embed.0", waves(depth, h.shape[1]))))
    for i in range(blocks):
        y = norm(f"layers.{i}.ln", h)
        gate = F.silu(linear(f"layers.{i}.gate_proj", y) * linear(f"layers.{i}.time_proj", e))
        h = h + linear(f"layers.{i}.down_proj", gate * linear(f"layers.{i}.up_proj", y))
    return linear("out_proj", norm("ln", h))


def test_equals_the_published_formula():
    torch.manual_seed(0)
    for multi in (False, True):
        net = Denoiser(8, 16, 24, 3, multi_layer=multi)
        z, t = torch.randn(10, 8), torch.randint(1, 1001, (10,)).float()
        depth = torch.rand(10) if multi else None
        expected = plain_velocity(net.state_dict(), z, t, depth, 3)
        assert torch.allclose(net(z, t / 1000, None, depth), expected, atol=1e-5)


def test_distinct_levels_gathered_equal_levels_per_row():
    torch.manual_seed(0)
    net = Denoiser(6, 12, 20, 2)
    u, index, z = torch.tensor([0.1, 0.5, 0.9]), torch.randint(3, (30,)), torch.randn(30, 6)
    shared, per_row = net(z, u, index), net(z, u[index])
    assert torch.allclose(shared, per_row, atol=1e-6)
    assert torch.allclose(net(z, u), net(z, u, torch.arange(30) // 10), atol=1e-6)
    grads = []
    for out in (shared, per_row):
        grads.append(torch.autograd.grad(out.square().sum(), list(net.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_meta_neurons_are_the_inputs_of_down_proj():
    net = Denoiser(6, 12, 20, 2)
    seen = []
    for block in net.layers:
        block.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    z, gates = torch.randn(5, 6), net.gates(torch.tensor([0.1]))
    net.velocity(z, gates)
    expected, seen[:] = list(seen), []
    assert all(torch.equal(a, b) for a, b in zip(net.meta_neurons(z, gates), expected, strict=True))


def test_tangents_are_those_of_automatic_differentiation():
    torch.manual_seed(0)
    net = Denoiser(6, 12, 20, 3).double().requires_grad_(False)
    torch.nn.init.normal_(net.ln.weight)
    z, t = torch.randn(9, 6, dtype=torch.float64), torch.randn(4, 9, 6, dtype=torch.float64)
    gates = net.gates(torch.tensor([0.3]))
    velocity, along = net.tangents(z, gates, t)
    assert torch.allclose(velocity, net.velocity(z, gates), atol=1e-12)
    for tangent, found in zip(t, along, strict=True):
        expected = torch.func.jvp(lambda s: net.velocity(s, gates), (z,), (tangent,))[1]
        assert torch.allclose(found, expected, atol=1e-12)


def test_sinusoid_of_zero():
    assert torch.equal(sinusoid(torch.zeros(1), 8), torch.tensor([[1.0] * 4 + [0.0] * 4]))
