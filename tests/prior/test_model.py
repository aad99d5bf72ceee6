import pytest
import safetensors.torch
import torch

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.calibrate import calibrate

D = 16


@pytest.fixture(scope="module")
def prior() -> ActivationPrior:
    config = PriorConfig(
        d=D,
        layers=(3, 5),
        subject_layers=8,
        d_model=32,
        d_mlp=48,
        n_blocks=2,
        variance_floor=1e-3,
        subject={"id": "x"},
    )
    torch.manual_seed(1)
    mean, var = torch.randn(2, D), torch.rand(2, D) * 4
    var[:, 0] = 0
    return ActivationPrior.untrained(config, mean, var)


def calls(prior, x, ids):
    return [
        prior.log_prob(x, layer=5, steps=4, ids=ids, seed=3).nats,
        prior.denoise(x, layer=5, steps=4, ids=ids, seed=3),
        prior.denoise(x, layer=5, mode="mean", ids=ids, seed=3),
        prior.encode(x, layer=5, ids=ids, seed=3),
        prior.sample(len(x), layer=5, steps=4, ids=ids, seed=3),
        prior.velocity_error(x, layer=5, ids=ids, seed=3),
        prior.denoise(x, u=torch.linspace(0, 1, 5)[ids[:, 1] % 5], layer=5, steps=4, ids=ids, seed=3),
        prior.encode(x, layer=5, noises=3, ids=ids, seed=3, block=1),
    ]


def test_a_row_does_not_depend_on_its_batch(prior, monkeypatch):
    torch.manual_seed(0)
    x, ids = torch.randn(40, D), torch.stack([torch.arange(40) * 7, torch.arange(40)], dim=1)
    whole = calls(prior, x, ids)
    mixed = torch.randperm(40)[:9]
    for a, b in zip(whole, calls(prior, x[mixed], ids[mixed]), strict=True):
        assert torch.allclose(a[mixed], b, atol=2e-5)
    monkeypatch.setattr("dmm_ray.prior.rows.CHUNK_FLOATS", 1000)
    for a, b in zip(whole, calls(prior, x, ids), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_seed_and_ids_change_the_noise(prior):
    x = torch.randn(4, D)
    first = prior.denoise(x, layer=3, seed=0)
    assert torch.equal(first, prior.denoise(x, layer=3, seed=0))
    assert not torch.allclose(first, prior.denoise(x, layer=3, seed=1))
    assert not torch.allclose(first, prior.denoise(x, layer=3, seed=0, ids=torch.arange(4) + 4))


def test_layers_are_conditioned_and_required(prior):
    x = torch.randn(4, D)
    assert not torch.allclose(prior.velocity(x, 0.3, layer=3), prior.velocity(x, 0.3, layer=5))
    with pytest.raises(UserError, match="layer: this prior models 3, 5"):
        prior.denoise(x)
    with pytest.raises(UserError, match=r"got 4"):
        prior.denoise(x, layer=4)


def test_velocity_with_a_level_per_row(prior):
    z, u = torch.randn(6, D), torch.tensor([0.1, 0.9, 0.1, 0.5, 0.5, 1.0])
    together = prior.velocity(z, u, layer=3)
    for i in range(6):
        assert torch.allclose(prior.velocity(z[i : i + 1], float(u[i]), layer=3)[0], together[i], atol=1e-5)
    with pytest.raises(UserError, match="u: expected one noise level"):
        prior.velocity(z, u[:2], layer=3)


def test_encode_blocks(prior):
    x = torch.randn(5, D)
    both = prior.encode(x, layer=3)
    assert both.shape == (5, 96)
    assert torch.allclose(prior.encode(x, layer=3, block=1), both[:, 48:])


def test_save_and_load_are_bit_equal(prior, tmp_path):
    prior.save_pretrained(str(tmp_path / "p"))
    again = ActivationPrior.from_pretrained(str(tmp_path / "p"))
    assert again.config == prior.config
    for (name, a), (_, b) in zip(prior.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(3, D)
    assert torch.equal(prior.denoise(x, layer=3), again.denoise(x, layer=3))


def test_calibration_travels_with_the_prior(prior, tmp_path):
    prior.save_pretrained(str(tmp_path / "bare"))
    assert ActivationPrior.from_pretrained(str(tmp_path / "bare")).calibration is None
    torch.manual_seed(0)
    x, ids = (
        prior.sample(200, layer=3),
        torch.stack([torch.arange(200) // 20, torch.arange(200) % 20 + 1], dim=1),
    )
    assert prior.log_prob(x, layer=3, steps=4).percentile is None
    prior.calibration = calibrate(prior, x, ids, layer=3, steps=4, probes=2)
    prior.save_pretrained(str(tmp_path / "p"))
    again = ActivationPrior.from_pretrained(str(tmp_path / "p"))
    for name in ("percentile", "latent_percentile", "combined_percentile"):
        found = getattr(prior.log_prob(x, layer=3, steps=4, ids=ids), name)
        assert torch.equal(found, getattr(again.log_prob(x, layer=3, steps=4, ids=ids), name))
        assert 40 < found.mean() < 60
        assert getattr(prior.log_prob(x, layer=5, steps=4), name) is None
    prior.calibration = None


def test_dead_dimensions_stay_finite(prior):
    assert prior.normalizer.var.min() == pytest.approx(1e-3)
    assert prior.denoise(torch.randn(3, D), layer=3).isfinite().all()


def test_untrained_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = PriorConfig(d=4, layers=(0,), d_model=8, d_mlp=8, n_blocks=1, variance_floor=1e-6)
    ActivationPrior.untrained(config, torch.zeros(4), torch.ones(4))
    assert torch.equal(torch.rand(3), expected)


class TestBadFolders:
    @pytest.fixture
    def saved(self, prior, tmp_path):
        prior.save_pretrained(str(tmp_path))
        return tmp_path

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            ActivationPrior.from_pretrained(str(tmp_path / "none"))

    def test_empty(self, tmp_path):
        with pytest.raises(UserError, match=r"no config\.json here"):
            ActivationPrior.from_pretrained(str(tmp_path))

    def test_another_models_config(self, saved):
        (saved / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match="not a prior's configuration"):
            ActivationPrior.from_pretrained(str(saved))

    def test_truncated_weights(self, saved):
        data = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(data[:-1])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            ActivationPrior.from_pretrained(str(saved))

    def test_weights_of_another_shape(self, saved):
        text = (saved / "config.json").read_text().replace('"d_mlp": 48', '"d_mlp": 40')
        (saved / "config.json").write_text(text)
        with pytest.raises(UserError, match="weights do not fit"):
            ActivationPrior.from_pretrained(str(saved))

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            (
                "normalizer.mean",
                torch.zeros(1, 3),
                r"normalizer.mean has shape \(1, 3\), config.json asks for",
            ),
            ("normalizer.var", torch.tensor(-1.0), "normalizer.var holds a negative variance"),
            ("normalizer.var", torch.tensor(float("nan")), "normalizer.var contains NaN or Inf"),
            (
                "denoiser.out_proj.bias",
                torch.tensor(float("inf")),
                "out_proj.bias contains NaN or Inf",
            ),
        ],
    )
    def test_broken_tensors_are_named(self, saved, name, value, says):
        file = saved / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(file).items()}
        if value.ndim:
            tensors[name] = value
        else:
            tensors[name].view(-1)[0] = value
        safetensors.torch.save_file(tensors, file)
        with pytest.raises(UserError, match=says):
            ActivationPrior.from_pretrained(str(saved))

    def test_unreachable_hub(self):
        with pytest.raises(UserError, match="no such folder, and it could not be downloaded"):
            ActivationPrior.from_pretrained("nobody/nothing")


def test_import_loads_no_ray():
    import subprocess
    import sys

    code = (
        "import sys, dmm_ray\nfor n in dmm_ray.__all__: getattr(dmm_ray, n)\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
