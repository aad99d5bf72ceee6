"""Building and loading a language model: only the blocks that are wanted, no head unless asked for."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from dmm_ray.errors import UserError
from dmm_ray.subject.blocks import stated_layers, text_model

logger = logging.getLogger(__name__)

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
"""Tried in this order: language models, multimodal ones, encoders."""


@dataclass(frozen=True)
class Placement:
    """Where the weights go."""

    device: str = "cpu"
    """A torch device for all of them, unless ``device_map`` is given."""
    device_map: str | None = None
    """How transformers spreads them over several devices, e.g. "auto"."""
    max_memory: Mapping[str, str] | None = None
    """Most memory to use by device ("0" is the first GPU, "cpu"), e.g. {"0": "70GiB"}; for ``device_map``."""
    offload_folder: str | None = None
    """Folder for the weights that fit nowhere else; for ``device_map``."""

    def spread(self, quantized: bool) -> dict[str, Any]:
        """The arguments of ``from_pretrained``; none for a plain model on one device.

        Raises:
            UserError: they need accelerate, which is not installed, or go with a device map and there is none.
        """
        if self.device_map is None and (self.max_memory or self.offload_folder):
            field = "max_memory" if self.max_memory else "offload_folder"
            raise UserError(f'{field}: goes with a device map; give device_map too, e.g. "auto"')
        if self.device_map is None and not quantized:
            return {}
        if importlib.util.find_spec("accelerate") is None:
            field = "device_map" if self.device_map else "model: quantised weights"
            raise UserError(f"{field}: needs accelerate; pip install 'dmm-ray[large]'")
        if self.device_map is None:
            return {"device_map": {"": self.device}}
        memory = {int(k) if k.isdigit() else k: v for k, v in (self.max_memory or {}).items()}
        return {
            "device_map": self.device_map,
            "max_memory": memory or None,
            "offload_folder": self.offload_folder,
        }


class LoadedModel(NamedTuple):
    """A model with its weights."""

    model: Any
    missing: list[str]
    """Names of weights that its files lack."""
    placed: dict[str, Any]
    """The device of each module, where it was spread by a device map."""

    def input_device(self, placement: Placement) -> torch.device:
        """Where token ids go: to the first accelerator in use."""
        if not self.placed:
            return torch.device(placement.device)
        return torch.device(next((d for d in self.placed.values() if d not in ("cpu", "disk")), "cpu"))


def is_quantized(config: Any) -> bool:
    """Whether the model's files hold quantised weights.

    Raises:
        UserError: quantised by a method that transformers does not know: it would load them as plain numbers.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return False
    from transformers.quantizers import AutoHfQuantizer  # slow to import, and few models need it

    settings = found if isinstance(found, dict) else found.to_dict()
    if not AutoHfQuantizer.supports_quant_method(settings):
        method = settings.get("quant_method")
        raise UserError(
            f"model: its weights are quantised by {method!r}, which transformers cannot read; "
            "give the model in another form"
        )
    return True


def build_skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The whole model on the meta device, without weights. Raises what transformers raises."""
    name = next((name for name in AUTO_CLASSES if _knows(name, config, trust_remote_code)), AUTO_CLASSES[0])
    with torch.device("meta"):
        return getattr(transformers, name).from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )


def is_causal(skeleton: Any) -> bool | None:
    """What the attention modules of its text model say of themselves; None where they say nothing."""
    found = (getattr(module, "is_causal", None) for module in text_model(skeleton).modules())
    flags = [flag for flag in found if isinstance(flag, bool)]
    return all(flags) if flags else None


def is_bidirectional(skeleton: Any) -> bool:
    """Whether a token sees those after it (an encoder), by its attention modules, else its configuration."""
    causal = is_causal(skeleton)
    if causal is not None:
        return not causal
    if getattr(skeleton.config, "is_decoder", None) is not None:
        return not skeleton.config.is_decoder
    return not _knows(AUTO_CLASSES[0], skeleton.config, True)


def position_offset(model: Any) -> int:
    """The position number of the first token: padding_idx + 1 in models that number like RoBERTa, else 0."""
    for module in model.modules():
        embedding = getattr(module, "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            return embedding.padding_idx + 1
    return 0


def cut_config(config: Any, n_blocks: int) -> Any:
    """A copy of ``config`` for its first ``n_blocks`` blocks: their number and every list with an entry per block."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(text).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == whole
    }
    text.num_hidden_layers = n_blocks
    for name, value in lists.items():
        setattr(text, name, value[:n_blocks])
    return config


def load_head(folder: Path, skeleton: Any, **options: Any) -> LoadedModel:
    """The whole model with its head."""
    return _load(type(skeleton), folder, skeleton.config, **options)


def load_blocks(folder: Path, skeleton: Any, path: str, n_blocks: int, **options: Any) -> LoadedModel:
    """The text model with its first ``n_blocks`` blocks and no head.

    Only those blocks' weights are read where a configuration cut to them builds the same blocks; else, as for
    models whose blocks depend on how many there are, all are read and those above dropped.

    Args:
        folder: of the model's files.
        skeleton: of the whole model.
        path: of the blocks inside its text model.
        n_blocks: how many to keep.
        options: for ``from_pretrained``.
    """
    base = skeleton.base_model
    config = _same_cut(skeleton, path, n_blocks) or base.config
    model, missing, placed = _load(type(base), folder, config, **options)
    text = text_model(model)
    del text.get_submodule(path)[n_blocks:]
    return LoadedModel(text, missing, placed)


def _load(cls: Any, folder: Path, config: Any, **options: Any) -> LoadedModel:
    model, report = cls.from_pretrained(
        folder, config=copy.deepcopy(config), output_loading_info=True, **_no_pooler(cls), **options
    )
    placed = getattr(model, "hf_device_map", {})
    return LoadedModel(model.eval().requires_grad_(False), sorted(report["missing_keys"]), placed)


def _no_pooler(cls: Any) -> dict[str, bool]:
    """The argument that leaves out an encoder's pooler, which masked language models have no weights for."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature(cls.__init__).parameters else {}


def _same_cut(skeleton: Any, path: str, n_blocks: int) -> Any | None:
    """The configuration cut to ``n_blocks`` if that builds what ``skeleton`` has up to there, else None."""
    base, whole = skeleton.base_model, text_model(skeleton)
    if stated_layers(base.config) != len(whole.get_submodule(path)):
        return None
    cut = cut_config(base.config, n_blocks)
    try:
        with torch.device("meta"):
            part = text_model(type(base)(copy.deepcopy(cut), **_no_pooler(type(base))))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as e:
        logger.info("all blocks are read: %s cannot be built with %d (%s)", type(base).__name__, n_blocks, e)
        return None
    same = len(part.get_submodule(path)) == n_blocks
    return cut if same and _describe(part, path).items() <= _describe(whole, path).items() else None


def _describe(text: nn.Module, path: str) -> dict[str, str]:
    """What each module of a text model is: its class, the shapes of its own weights and, inside the blocks, its
    plain settings (outside them a module may well hold the number of blocks)."""
    return {
        name: repr(
            (
                type(module),
                [(key, weight.shape) for key, weight in module.named_parameters(recurse=False)],
                _settings(module) if name.startswith(f"{path}.") else None,
            )
        )
        for name, module in text.named_modules()
        if name != path
    }


def _settings(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}


def _knows(auto_class: str, config: Any, trust_remote_code: bool) -> bool:
    """Whether transformers, or code that comes with the model, has such a class for it."""
    remote = trust_remote_code and auto_class in (getattr(config, "auto_map", None) or {})
    return remote or type(config) in getattr(transformers, auto_class)._model_mapping
