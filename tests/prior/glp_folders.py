"""Published folders of small random priors, and their velocity straight from the published formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D, D_MODEL, D_MLP, N_BLOCKS = 12, 24, 48, 2
MODEL = "meta-llama/Llama-3.2-1B"


def weights(conditioned: bool, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a denoiser under its published name."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        found[f"model.{name}.weight"] = torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
        found[f"model.{name}.bias"] = torch.randn(n_out, generator=generator) / 4

    def norm(name: str) -> None:
        found[f"model.{name}.weight"] = 1 + torch.randn(D_MODEL, generator=generator) / 4
        found[f"model.{name}.bias"] = torch.randn(D_MODEL, generator=generator) / 4

    linear("in_proj", D, D_MODEL)
    linear("out_proj", D_MODEL, D)
    for embedding in ("time_embed", "layer_embed") if conditioned else ("time_embed",):
        linear(f"{embedding}.0", D_MODEL, D_MODEL)
        linear(f"{embedding}.2", D_MODEL, D_MODEL)
    for i in range(N_BLOCKS):
        for name in ("up_proj", "gate_proj", "time_proj"):
            linear(f"layers.{i}.{name}", D_MODEL, D_MLP)
        linear(f"layers.{i}.down_proj", D_MLP, D_MODEL)
        norm(f"layers.{i}.ln")
    norm("ln")
    return found


def statistics(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    """A mean and a variance of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean": torch.randn(shape, generator=generator),
        "var": torch.rand(shape, generator=generator) * 9 + 0.01,
    }


def settings(layers: list[int], of: int | None = None, retain: str = "output") -> dict[str, Any]:
    """A configuration, written as the published ones are."""
    return {
        "save_root": ".",
        "model_name": MODEL,
        "run_name": "glp-llama1b-d${glp_kwargs.denoiser_config.n_layers}",
        "output_path": "${save_root}/runs/${run_name}",
        "train_dataset": "${save_root}/data/layer",
        "rep_statistic": "${train_dataset}/rep_statistics.pt",
        "width": D,
        "glp_kwargs": {
            "normalizer_config": {"rep_statistic": "${rep_statistic}"},
            "denoiser_config": {
                "d_input": "${width}",
                "d_model": D_MODEL,
                "d_mlp": D_MLP,
                "n_layers": N_BLOCKS,
                "multi_layer_n_layers": of,
            },
            "tracedict_config": {"layer_prefix": "model.layers", "layers": layers, "retain": retain},
        },
        "learning_rate": "5e-5",
    }


def write(
    folder: Path,
    layers: list[int],
    of: int | None = None,
    retain: str = "output",
    stats: dict[str, Tensor] | None = None,
    name: str = "final.safetensors",
    seed: int = 0,
) -> Path:
    """A published folder of a prior of blocks ``layers`` among ``of`` (None: no layer condition)."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(layers, of, retain)))
    torch.save(stats or statistics(*([of] if of else []), D), folder / "rep_statistics.pt")
    save_file(weights(of is not None, seed), folder / name)
    return folder


def velocity(w: dict[str, Tensor], z: Tensor, s: float, block: int | None = None, of: int = 0) -> Tensor:
    """The published formula for rows z (n, d) at noise level s, in float64; ``block`` only with a layer condition."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in w.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def embed(name: str, t: float) -> Tensor:
        half = D_MODEL // 2
        angles = t * torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)]).double()
        return linear(f"{name}.2", silu(linear(f"{name}.0", torch.cat([angles.cos(), angles.sin()]))))

    h, e = linear("in_proj", z.double()), embed("time_embed", 1000 * s)
    if block is not None:
        e = e + embed("layer_embed", block / (of - 1))
    for i in range(N_BLOCKS):
        y, at = norm(f"layers.{i}.ln", h), f"layers.{i}"
        gate = silu(linear(f"{at}.gate_proj", y) * linear(f"{at}.time_proj", e))
        h = h + linear(f"{at}.down_proj", gate * linear(f"{at}.up_proj", y))
    return linear("out_proj", norm("ln", h))
