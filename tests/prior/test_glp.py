"""Published priors: loaded, imported and exported without a bit's change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from glp_folders import D_MLP, D_MODEL, MODEL, N_BLOCKS, D, statistics, velocity, weights, write
from safetensors.torch import load_file, save_file

from dmm_ray.errors import UserError
from dmm_ray.prior import ActivationPrior, PriorConfig, folder
from dmm_ray.prior.glp_verbs import ExportGlpConfig, ImportGlpConfig, export_glp, import_glp

LEVELS = (0.001, 0.1, 0.37, 0.5, 0.9, 1.0)
KINDS = {
    "one": ([7], None, "output"),
    "one, of inputs": ([7], None, "input"),
    "one, conditioned": ([2], 4, "output"),
    "several": ([0, 1, 2, 3], 4, "output"),
    "several, of inputs": ([0, 1, 2, 3], 4, "input"),
    "some": ([3, 1], 4, "output"),
}


def imported(source: Path, out: Path) -> str:
    return import_glp(ImportGlpConfig(source=str(source), out=str(out)))


def exported(prior: str, out: Path) -> Path:
    return Path(export_glp(ExportGlpConfig(prior=prior, out=str(out))))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_velocities_follow_the_published_formula(tmp_path, kind):
    layers, of, retain = KINDS[kind]
    source = write(tmp_path / "glp", layers, of, retain)
    torch.manual_seed(0)
    z = torch.randn(5, D)
    for prior in (
        ActivationPrior.from_pretrained(str(source)),
        ActivationPrior.from_pretrained(imported(source, tmp_path / "ours")),
    ):
        assert prior.layers == tuple(k - (retain == "input") for k in layers)
        for block, layer in zip(layers, prior.layers, strict=True):
            for u in LEVELS:
                expected = velocity(weights(of is not None), z, u, block if of else None, of or 0)
                assert (prior.velocity(z, u, layer=layer) - expected).abs().max() < 1e-5, (layer, u)


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_change_no_bit(tmp_path, kind):
    layers, of, retain = KINDS[kind]
    source = write(tmp_path / "glp", layers, of, retain)
    first = imported(source, tmp_path / "first")
    back = exported(first, tmp_path / "back")
    assert_equal(load_file(source / "final.safetensors"), load_file(back / "final.safetensors"))
    before, after = (torch.load(f / "rep_statistics.pt", weights_only=True) for f in (source, back))
    for name in ("mean", "var"):
        assert (
            torch.equal(after[name][layers], before[name][layers])
            if of
            else torch.equal(*(after[name], before[name]))
        )
    again = imported(back, tmp_path / "again")
    assert folder.load_config(again) == folder.load_config(first)
    assert_equal(folder.load(again)[1], folder.load(first)[1])


@pytest.mark.parametrize(("layers", "of"), [((5,), 8), ((1, 4, 6), 8)])
def test_ours_comes_back_from_the_published_format(tmp_path, layers, of):
    config = PriorConfig(
        d=D,
        layers=layers,
        subject_layers=of,
        d_model=D_MODEL,
        d_mlp=D_MLP,
        n_blocks=N_BLOCKS,
        variance_floor=1e-3,
        subject={"id": "some/model", "revision": "a${b}", "n_layers": of},
        split={"seed": 3},
        training={"samples": 10},
    )
    mean, var = torch.randn(len(layers), D), torch.rand(len(layers), D)
    var[:, 0] = 0
    ActivationPrior.untrained(config, mean, var, seed=4).save_pretrained(str(tmp_path / "ours"))
    out = exported(str(tmp_path / "ours"), tmp_path / "glp")
    back = imported(out, tmp_path / "back")
    assert folder.load_config(back) == config
    assert_equal(folder.load(back)[1], folder.load(str(tmp_path / "ours"))[1])


def test_an_export_is_what_the_published_loader_reads(tmp_path):
    """It sets ``rep_statistic``, resolves, builds from ``glp_kwargs``, and looks statistics up by block."""
    source = write(tmp_path / "glp", [3, 1], 4, "input")
    out = exported(str(source), tmp_path / "out")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model_name"] == MODEL
    assert config["glp_kwargs"] == {
        "normalizer_config": {"rep_statistic": "${rep_statistic}"},
        "denoiser_config": {
            "d_input": D,
            "d_model": D_MODEL,
            "d_mlp": D_MLP,
            "n_layers": N_BLOCKS,
            "multi_layer_n_layers": 4,
        },
        "tracedict_config": {"layer_prefix": "model.layers", "layers": [3, 1], "retain": "input"},
    }
    found = torch.load(out / "rep_statistics.pt", weights_only=True)
    assert found["mean"].shape == found["var"].shape == (4, D)
    assert torch.equal(found["var"][3], statistics(4, D)["var"][3])
    assert torch.equal(found["var"][0], torch.ones(D))


@pytest.mark.parametrize(
    ("shape", "layers", "of"),
    [
        ((D,), [7], None),
        ((1, D), [7], None),
        ((1, 1, D), [7], None),
        ((4, D), [2], 4),
        ((D,), [1, 3], 4),
        ((2, D), [1, 3], 4),
        ((1, 4, D), [1, 3], 4),
        ((4, 1, D), [1, 3], 4),
    ],
)
def test_statistics_of_every_shape(tmp_path, shape, layers, of):
    stats = statistics(*shape)
    config, tensors = folder.load(str(write(tmp_path, layers, of, stats=stats)))
    table = stats["mean"].reshape(-1, D)
    rows = table[layers] if len(table) == of else table.expand(len(layers), D)
    assert torch.equal(tensors["normalizer.mean"], rows)
    assert config.variance_floor == float(tensors["normalizer.var"].min())


def test_the_input_of_block_0_is_layer_minus_1(tmp_path):
    prior = ActivationPrior.from_pretrained(str(write(tmp_path, [0, 1, 2, 3], 4, "input")))
    assert prior.layers == (-1, 0, 1, 2)
    assert [prior.config.depth(k) for k in prior.layers] == [0, 1 / 3, 2 / 3, 1]
    assert torch.equal(prior.normalizer.mean[prior.layer_index(-1)], statistics(4, D)["mean"][0])
    assert prior.log_prob(torch.randn(3, D), layer=-1, steps=2).nats.isfinite().all()


def test_zero_variances_stay_finite_and_the_others_as_they_are(tmp_path, caplog):
    stats = statistics(D)
    stats["var"][:3] = 0
    with caplog.at_level(logging.WARNING, logger="dmm_ray"):
        prior = ActivationPrior.from_pretrained(str(write(tmp_path, [7], stats=stats)))
    assert f"3 variances are zero; {prior.normalizer.floor:.3g} is used for them" in caplog.text
    smallest = stats["var"][3:].min()
    assert torch.equal(prior.normalizer.var[0], torch.cat([smallest.expand(3), stats["var"][3:]]))
    assert prior.log_prob(torch.randn(3, D), steps=2).nats.isfinite().all()


def test_the_newest_checkpoint_stands_in_for_final_weights(tmp_path, caplog):
    write(tmp_path, [7], name="checkpoints/epoch_0009.safetensors", seed=9)
    write(tmp_path, [7], name="checkpoints/epoch_0128.safetensors", seed=128)
    with caplog.at_level(logging.INFO, logger="dmm_ray"):
        _, tensors = folder.load(str(tmp_path))
    assert "checkpoints/epoch_0128.safetensors" in caplog.text
    expected = weights(False, seed=128)["model.in_proj.weight"]
    assert torch.equal(tensors["denoiser.in_proj.weight"], expected)


def test_paths_that_omegaconf_wrote_as_objects(tmp_path):
    write(tmp_path, [7])
    with (tmp_path / "config.yaml").open("a") as f:
        f.write("log_path: !!python/object/apply:pathlib.PosixPath\n- /\n- runs\n")
    assert folder.load_config(str(tmp_path)).layers == (7,)


def test_layers_by_module_name(tmp_path):
    write(tmp_path, [7])
    text = (tmp_path / "config.yaml").read_text().replace("- 7", "- model.layers.7")
    (tmp_path / "config.yaml").write_text(text.replace("layer_prefix: model.layers", "layer_prefix: null"))
    config = folder.load_config(str(tmp_path))
    assert (config.layers, config.subject) == ((7,), {"id": MODEL, "block_path": "model.layers"})


def test_half_precision_weights_are_widened(tmp_path):
    write(tmp_path, [7])
    halved = {name: tensor.bfloat16() for name, tensor in weights(False).items()}
    save_file(halved, tmp_path / "final.safetensors")
    _, tensors = folder.load(str(tmp_path))
    assert tensors["denoiser.ln.bias"].dtype == torch.float32
    assert torch.equal(tensors["denoiser.ln.bias"], halved["model.ln.bias"].float())


def test_by_uri(tmp_path):
    write(tmp_path / "glp", [7])
    fsspec.filesystem("memory").put(str(tmp_path / "glp"), "/published", recursive=True)
    config, tensors = folder.load("memory://published")
    assert config == folder.load_config(str(tmp_path / "glp"))
    assert_equal(tensors, folder.load(str(tmp_path / "glp"))[1])


def test_a_saved_prior_can_be_replaced_while_it_is_loaded(tmp_path):
    """Weights are mapped: a save puts a new file in the old one's place."""
    source, out = str(write(tmp_path / "glp", [7])), str(tmp_path / "ours")
    imported(Path(source), Path(out))
    prior = ActivationPrior.from_pretrained(out)
    prior.save_pretrained(out)
    assert_equal(folder.load(out)[1], folder.load(source)[1])
    assert torch.equal(prior.denoiser.ln.weight, weights(False)["model.ln.weight"])


def test_the_verbs_write_a_summary_and_leave_other_folders_alone(tmp_path):
    source, out = write(tmp_path / "glp", [7]), tmp_path / "ours"
    assert imported(source, out) == imported(source, out) == str(out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["inputs"]["config"]["source"] == str(source)
    assert summary["inputs"]["weights"] == "final.safetensors"
    assert summary["figures"]["layers"] == [7]
    other = write(tmp_path / "other", [3])
    with pytest.raises(UserError, match=r"source: .*ours was made with .*glp, not .*other; choose another"):
        imported(other, out)
    with pytest.raises(UserError, match=r"glp holds another config.yaml; choose another folder"):
        exported(str(out), source)
    assert folder.load_config(str(out)).layers == (7,)
