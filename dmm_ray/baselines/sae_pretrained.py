"""Loading a pretrained sparse autoencoder from its safetensors file and configuration.

Tensors may be named as in SAELens (``W_enc`` (d, l), ``b_enc``, ``W_dec`` (l, d), ``b_dec``, ``threshold``) or in
dictionary_learning and sparsify (``encoder.weight`` (l, d), ``encoder.bias``, ``decoder.weight`` (d, l), ``b_dec`` or
``bias``). The saved autoencoder works on raw activations; the normaliser is folded into its weights, so the loaded one
works on normalised rows.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.baselines.sae import SAE
from dmm_ray.errors import UserError
from dmm_ray.files import exists, join, list_files, read_bytes, read_json

TENSOR_NAMES = {
    "encoder": ("W_enc", "encoder.weight"),
    "encoder_bias": ("b_enc", "encoder.bias"),
    "decoder": ("W_dec", "decoder.weight"),
    "bias": ("b_dec", "bias"),
}
CONFIGS = ("cfg.json", "config.json")
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
"""Supported activations; if a configuration names several, the one that comes last here applies."""
ALIASES = {
    "standard": "relu",
    "autoencoder": "relu",
    "jumpreluautoencoder": "jumprelu",
    "autoencodertopk": "topk",
    "batchtopksae": "batchtopk",
}
"""Other names that the formats use for them."""


def load_sae(path: str, mean_d: Tensor, scale_d: Tensor) -> SAE:
    """Load the autoencoder in a folder, converted to work on rows ``z = (x - mean) / scale``.

    Args:
        path: folder or URI with cfg.json (or config.json) and one .safetensors file.
        mean_d: (d,), mean of the normaliser.
        scale_d: (d,), scale of the normaliser.

    Raises:
        UserError: missing or unreadable files, a wrong width, or an unsupported activation or normalisation.
    """
    config, weights = _config(path), _weights(path)
    activation, k = _activation(config, path)
    found = {name: _named(weights, names, path) for name, names in TENSOR_NAMES.items()}
    encoder = found["encoder"].T if "W_enc" in weights else found["encoder"]
    decoder = found["decoder"] if "W_dec" in weights else found["decoder"].T
    latents, d = len(found["encoder_bias"]), len(mean_d)
    if encoder.shape != (latents, d) or decoder.shape != (latents, d) or found["bias"].shape != (d,):
        raise UserError(
            f"pretrained_sae: {path} has an encoder of shape {tuple(encoder.shape)} and a decoder of "
            f"{tuple(decoder.shape)}; {latents} latents of d = {d} need ({latents}, {d}) each"
        )
    if config.get("rescale_acts_by_decoder_norm"):
        norm = decoder.norm(dim=1)
        encoder, decoder = encoder * norm[:, None], decoder / norm[:, None]
        found["encoder_bias"] = found["encoder_bias"] * norm
    threshold = None if activation == "topk" else _threshold(weights, activation, latents, path)
    # a(W (x - s b) + c) D + b with x = scale z + mean, in the form of SAE: the same bias before and after.
    mean, scale = mean_d.double().cpu(), scale_d.double().cpu()
    subtracted = config.get("apply_b_dec_to_input", activation != "jumprelu")
    shift = torch.zeros_like(found["encoder_bias"]) if subtracted else encoder @ found["bias"]
    parts = (
        encoder * scale,
        found["encoder_bias"] + shift,
        decoder / scale,
        (found["bias"] - mean) / scale,
        torch.zeros_like(mean),
    )
    encoder, encoder_bias, decoder, bias, mean = (
        part.float().contiguous().to(mean_d.device) for part in parts
    )
    threshold = None if threshold is None else threshold.float().to(mean_d.device)
    return SAE(encoder, encoder_bias, decoder, bias, mean, k, threshold)


def _config(path: str) -> dict[str, Any]:
    for name in CONFIGS:
        if exists(join(path, name)):
            config = read_json(join(path, name))
            nested = config.get("trainer")  # dictionary_learning keeps the autoencoder's options there
            return config | nested if isinstance(nested, dict) else config
    raise UserError(f"pretrained_sae: {path} has no {CONFIGS[0]}; give the folder of a saved autoencoder")


def _weights(path: str) -> dict[str, Tensor]:
    """All tensors, in float64."""
    files = list_files(path, (".safetensors",))
    files = [name for name in files if "sparsity" not in name.rsplit("/", 1)[-1]]
    if len(files) != 1:
        raise UserError(f"pretrained_sae: {path} has {len(files)} .safetensors files; give a folder with one")
    try:
        weights = safetensors.torch.load(read_bytes(files[0]))
    except safetensors.SafetensorError as error:
        raise UserError(f"pretrained_sae: {files[0]} cannot be read: {error}") from error
    wrong = [name for name, w in weights.items() if w.is_floating_point() and not w.isfinite().all()]
    if wrong:
        raise UserError(f"pretrained_sae: {files[0]} contains NaN or Inf in {wrong[0]}")
    return {name: w.double() for name, w in weights.items()}


def _activation(config: dict[str, Any], path: str) -> tuple[str, int | None]:
    """Which of ``ACTIVATIONS`` it uses, and its k. Raises UserError for any other, and for normalised inputs."""
    if config.get("normalize_activations") not in (None, False, "none"):
        raise UserError(
            f"pretrained_sae: {path} expects activations normalised by {config['normalize_activations']}; fold that "
            "into its weights first"
        )
    keys = ("architecture", "dict_class", "activation_fn_str", "activation_fn", "activation")
    said = [str(config[key]).lower().replace("_", "").replace("-", "") for key in keys if config.get(key)]
    known = [ALIASES.get(name, name) for name in said]
    if not known or any(name not in ACTIVATIONS for name in known):
        raise UserError(
            f"pretrained_sae: {path}: unsupported activation (got {', '.join(said) or 'none'}); only ReLU, JumpReLU, "
            "TopK and BatchTopK are supported"
        )
    activation = max(known, key=ACTIVATIONS.index)
    if activation != "topk":
        return activation, None
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if not isinstance(k, int) or k < 1:
        raise UserError(f"pretrained_sae: {path} is a TopK autoencoder whose cfg.json has no k")
    return activation, k


def _threshold(weights: dict[str, Tensor], activation: str, latents: int, path: str) -> Tensor:
    """The value (l,) above which each latent is active."""
    if activation == "relu":
        return torch.zeros(latents)
    threshold = _named(weights, ("threshold",), path)
    if threshold.numel() not in (1, latents):
        raise UserError(f"pretrained_sae: {path} has {latents} latents and {threshold.numel()} thresholds")
    return threshold.clamp_min(0).flatten().expand(latents)


def _named(weights: dict[str, Tensor], names: tuple[str, ...], path: str) -> Tensor:
    for name in names:
        if name in weights:
            return weights[name]
    raise UserError(f"pretrained_sae: {path} has no tensor {' or '.join(names)}; it has {', '.join(weights)}")
