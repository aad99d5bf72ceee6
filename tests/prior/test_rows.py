import logging
import threading

import pytest
import torch
from gaussians import gaussian_prior, random_covariance

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig

D = 8


@pytest.fixture(scope="module")
def prior() -> ActivationPrior:
    config = PriorConfig(
        d=D,
        layers=(4,),
        d_model=16,
        d_mlp=16,
        n_blocks=1,
        variance_floor=1e-6,
        subject={"id": "some/model"},
    )
    return ActivationPrior.untrained(config, torch.full((D,), 2.0), torch.full((D,), 9.0))


def natural(n: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, D) * 3 + 2


@pytest.mark.parametrize(
    ("rows", "warns"),
    [
        (natural(50), False),
        (natural(50) * 0.5, False),
        (natural(50) * 1.5, False),
        (torch.cat([natural(30), natural(20) * 100]), False),
        (natural(50) * 5, True),
        (natural(50) * 0.01 + 2, True),
    ],
)
def test_a_warning_where_rows_do_not_fit_the_normaliser(prior, rows, warns, caplog, monkeypatch):
    monkeypatch.setattr("dmm_ray.prior.rows.CHUNK_FLOATS", 160)  # several pieces, one warning
    prior.normalizer.warned.clear()
    with caplog.at_level(logging.WARNING):
        prior.denoise(rows, steps=1)
        prior.denoise(rows, steps=1)  # one is enough
    assert len(caplog.records) == warns
    if warns:
        assert "layer 4 of some/model" in caplog.text


def test_a_million_rows_take_little_more_than_their_result(prior, monkeypatch):
    """The largest tensor made has as many numbers as the result; network-wide ones stay small."""
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype.is_floating_point:
                sizes.append(found.untyped_storage().nbytes())
            return found

    monkeypatch.setattr("dmm_ray.prior.rows.CHUNK_FLOATS", 1 << 20)
    x = torch.randn(1_000_000, D) * 3 + 2
    with Largest():
        restored = prior.denoise(x, u=0.3, steps=1)
        score = prior.velocity_error(x, pairs=1)
        nats = prior.log_prob(x, steps=1, probes=1).nats
    assert max(sizes) <= x.nbytes
    assert restored.isfinite().all()
    assert nats.shape == score.shape == (1_000_000,)
    last = slice(999_990, 1_000_000)
    ids = torch.arange(999_990, 1_000_000)
    assert torch.allclose(prior.denoise(x[last], u=0.3, steps=1, ids=ids), restored[last], atol=1e-5)


def test_all_rows_are_checked_before_any_work(prior, monkeypatch):
    monkeypatch.setattr("dmm_ray.prior.rows.CHUNK_FLOATS", 160)
    x, worked = natural(100), []
    x[77, 3] = torch.inf
    prior.denoiser.in_proj.register_forward_hook(lambda *_: worked.append(1))
    with pytest.raises(UserError, match="row 77 contains"):
        prior.denoise(x)
    assert worked == []
    prior.denoise(x[:3])
    assert worked


def test_numpy_lists_and_other_floats_are_taken(prior):
    x = natural(3)
    expected = prior.denoise(x)
    for other in (x.numpy(), x.tolist(), x.double(), x.double().numpy()):
        assert torch.allclose(prior.denoise(other), expected, atol=1e-5)


def test_threads_may_share_a_prior():
    prior = gaussian_prior(random_covariance(6))
    x, found = torch.randn(50, 6), {}
    expected = prior.log_prob(x, steps=8).nats
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: prior.log_prob(x, steps=8).nats}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[i], expected, atol=1e-5) for i in range(4))
