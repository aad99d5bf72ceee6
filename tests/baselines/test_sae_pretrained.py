"""Autoencoders that others trained, in each format's names, against their definition on raw activations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dmm_ray.baselines import load_sae
from dmm_ray.errors import UserError

LATENTS, D = 12, 5
MEAN, SCALE = torch.linspace(-2, 3, D), torch.linspace(0.5, 4, D)


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(D, LATENTS, generator=g),
        "b_enc": torch.randn(LATENTS, generator=g),
        "W_dec": torch.randn(LATENTS, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }


def saved(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], name: str = "cfg.json") -> str:
    (folder / name).write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return str(folder)


def other_names(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
    }


def raw_rows() -> Tensor:
    return 3 * torch.randn(40, D, generator=torch.Generator().manual_seed(1))


def top(latents: Tensor, k: int) -> Tensor:
    kept = latents.topk(k, dim=1)
    return torch.zeros_like(latents).scatter(1, kept.indices, kept.values.relu())


THRESHOLD = torch.linspace(0, 2, LATENTS)
CASES = {
    "saelens relu": (
        {"architecture": "standard", "activation_fn": "relu", "apply_b_dec_to_input": True},
        True,
        lambda a: a.relu(),
    ),
    "saelens jumprelu": (
        {"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": "none"},
        False,
        lambda a: a * (a > THRESHOLD),
    ),
    "saelens topk": (
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        True,
        lambda a: top(a, 3),
    ),
    "sparsify topk": ({"activation": "topk", "k": 3}, True, lambda a: top(a, 3)),
    "dictionary_learning": (
        {"trainer": {"dict_class": "AutoEncoderTopK", "k": 3}},
        True,
        lambda a: top(a, 3),
    ),
    "dictionary_learning batch": (
        {"trainer": {"dict_class": "BatchTopKSAE", "k": 3}},
        True,
        lambda a: a * (a > 0.7),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_reconstructs_as_its_definition_does_on_raw_rows(tmp_path: Path, case: str) -> None:
    config, subtracted, activation = CASES[case]
    w, x = weights(), raw_rows()
    tensors, name = dict(w), "cfg.json"
    if case.startswith("dictionary_learning"):
        tensors, name = other_names(w), "config.json"
    if case == "saelens jumprelu":
        tensors["threshold"] = THRESHOLD
    if case.endswith("batch"):
        tensors["threshold"] = torch.tensor(0.7)
    sae = load_sae(saved(tmp_path, config, tensors, name), MEAN, SCALE)
    latents = (x - w["b_dec"] * subtracted) @ w["W_enc"] + w["b_enc"]
    expected = activation(latents) @ w["W_dec"] + w["b_dec"]
    got = sae.reconstruct((x - MEAN) / SCALE) * SCALE + MEAN
    assert torch.allclose(got, expected, atol=1e-4)
    assert sae.latents == LATENTS


def test_topk_of_activations_rescaled_by_the_decoders_norm(tmp_path: Path) -> None:
    w, x = weights(), raw_rows()
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    sae = load_sae(saved(tmp_path, config, w), MEAN, SCALE)
    norm = w["W_dec"].norm(dim=1)
    latents = top(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm, 3) / norm
    expected = latents @ w["W_dec"] + w["b_dec"]
    assert torch.allclose(sae.reconstruct((x - MEAN) / SCALE) * SCALE + MEAN, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"architecture": "gated"}, {}, r"unsupported activation \(got gated\); only ReLU, JumpReLU, TopK"),
        ({}, {}, r"unsupported activation \(got none\)"),
        ({"activation": "relu", "normalize_activations": "layer_norm"}, {}, "normalised by layer_norm"),
        ({"activation": "topk"}, {}, "has no k"),
        ({"architecture": "jumprelu"}, {}, "has no tensor threshold"),
        ({"architecture": "jumprelu"}, {"threshold": torch.zeros(3)}, "12 latents and 3 thresholds"),
        (
            {"activation": "relu"},
            {"W_dec": torch.zeros(LATENTS, 4)},
            r"decoder of \(12, 4\); 12 latents of d = 5",
        ),
        (
            {"activation": "relu"},
            {"b_enc": torch.full((LATENTS,), torch.nan)},
            "contains NaN or Inf in b_enc",
        ),
    ],
    ids=["gated", "no name", "normalised", "no k", "no threshold", "thresholds", "width", "nan"],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, config, change, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_sae(saved(tmp_path, config, weights() | change), MEAN, SCALE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pretrained_sae: ")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no cfg\.json"):
        load_sae(str(tmp_path), MEAN, SCALE)
    (tmp_path / "cfg.json").write_text('{"activation": "relu"}')
    with pytest.raises(UserError, match=r"has 0 \.safetensors files"):
        load_sae(str(tmp_path), MEAN, SCALE)
    (tmp_path / "sae.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"sae\.safetensors cannot be read"):
        load_sae(str(tmp_path), MEAN, SCALE)
    save_file({"W_enc": torch.zeros(D, LATENTS)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match=r"has no tensor b_enc or encoder\.bias"):
        load_sae(str(tmp_path), MEAN, SCALE)
