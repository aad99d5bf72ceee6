import copy

import pytest
import torch

from dmm_ray.prior import ActivationPrior, PriorConfig

D = 8


@pytest.fixture
def prior() -> ActivationPrior:
    config = PriorConfig(
        d=D, layers=(0, 1), subject_layers=4, d_model=16, d_mlp=24, n_blocks=2, variance_floor=1e-6
    )
    return ActivationPrior.untrained(config, torch.zeros(2, D), torch.ones(2, D))


def count_time_paths(prior: ActivationPrior) -> list[int]:
    calls: list[int] = []
    prior.denoiser.time_embed.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_time_path_runs_once_for_each_level_and_layer(prior, monkeypatch):
    monkeypatch.setattr("dmm_ray.prior.rows.CHUNK_FLOATS", 24 * 4)
    calls, x = count_time_paths(prior), torch.randn(20, D)
    prior.log_prob(x, layer=0, steps=4)
    assert len(calls) == 8  # four starts and four middles
    prior.log_prob(x, layer=0, steps=4)
    assert len(calls) == 8
    prior.log_prob(x, layer=1, steps=4)
    assert len(calls) == 16


def test_what_is_remembered_is_bounded(prior, monkeypatch):
    monkeypatch.setattr("dmm_ray.prior.velocities.GATE_FLOATS", 0)
    calls, x = count_time_paths(prior), torch.randn(2, D)
    for k in range(50):
        prior.denoise(x, u=0.01 * (k + 1), mode="mean", layer=0)
    assert len(prior.velocities.field(prior.denoiser, 0).known) == 8
    prior.denoise(x, u=0.5, mode="mean", layer=0)
    assert len(calls) == 50
    prior.denoise(x, u=0.01, mode="mean", layer=0)
    assert len(calls) == 51


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", ["in place", "load", "cast", "data", "data of one"])
def test_changed_weights_are_used(prior, change, precision):
    x = torch.randn(3, D)
    before = prior.denoise(x, layer=0, precision=precision)
    with torch.no_grad():
        if change == "in place":
            for p in prior.denoiser.parameters():
                p.mul_(0.5)
        elif change == "data":
            for p in prior.denoiser.parameters():
                p.data.mul_(0.5)
        elif change == "data of one":
            prior.denoiser.time_embed[0].weight.data.neg_()
        elif change == "load":
            prior.denoiser.load_state_dict({k: v * 0.5 for k, v in prior.denoiser.state_dict().items()})
        else:
            prior.denoiser.to(torch.float64).to(torch.bfloat16)
    after = prior.denoise(x, layer=0, precision=precision)
    fresh = copy.deepcopy(prior)
    fresh.velocities = type(fresh.velocities)(prior.config)
    assert torch.equal(after, fresh.denoise(x, layer=0, precision=precision))
    if (change, precision) != ("cast", "bfloat16"):
        assert not torch.equal(after, before)


def test_double_precision_of_the_weights_is_kept(prior):
    z = torch.randn(4, D)
    single, double = prior.velocity(z, 0.3, layer=1), copy.deepcopy(prior).double()
    found = double.velocity(z.double(), 0.3, layer=1)
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), single, atol=1e-5)
    x = torch.randn(4, D)
    assert torch.allclose(
        double.log_prob(x, layer=1, steps=4).nats, prior.log_prob(x, layer=1, steps=4).nats, atol=1e-3
    )


@pytest.mark.slow
def test_compiled_gives_the_same(prior):
    x = torch.randn(20, D)

    def calls():
        return [
            prior.denoise(x, layer=1, steps=3),
            prior.log_prob(x, layer=1, steps=2).nats,
            prior.denoise(x[:11], u=torch.linspace(0, 1, 11), layer=1, steps=2),
        ]

    eager = calls()
    prior.compile()
    for a, b in zip(eager, calls(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.no_grad():
        prior.denoiser.out_proj.weight.mul_(0.5)
    assert not torch.allclose(prior.denoise(x, layer=1, steps=3), eager[0], atol=1e-3)


def test_the_caller_s_autocast_changes_nothing_and_leaves_nothing(prior):
    x = torch.randn(9, D)
    calls = {
        "log_prob": lambda: prior.log_prob(x, layer=1, steps=3).nats,
        "encode": lambda: prior.encode(x, layer=1),
        "velocity": lambda: prior.velocity(x, torch.linspace(0.1, 0.9, 9), layer=1),
        "exact": lambda: prior.log_prob(x, layer=0, steps=2, probes=0).nats,
    }
    fresh = copy.deepcopy(prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the first calls: what they remember is used later
        inside = {name: call() for name, call in calls.items()}
    after = {name: call() for name, call in calls.items()}
    prior = fresh
    for name, call in calls.items():
        right = call()
        assert right.dtype == inside[name].dtype
        assert torch.equal(inside[name], right), name
        assert torch.equal(after[name], right), name


def test_a_prior_loaded_in_inference_mode(prior, tmp_path):
    prior.save_pretrained(str(tmp_path))
    x = torch.randn(5, D)
    right = prior.log_prob(x, layer=1, steps=2).nats, prior.denoise(x, layer=0, steps=2, precision="bfloat16")
    with torch.inference_mode():
        loaded = ActivationPrior.from_pretrained(str(tmp_path))
        inside = loaded.log_prob(x, layer=1, steps=2).nats
    assert torch.equal(inside, right[0])
    assert torch.equal(loaded.log_prob(x, layer=1, steps=2).nats, right[0])
    assert torch.equal(loaded.denoise(x, layer=0, steps=2, precision="bfloat16"), right[1])
