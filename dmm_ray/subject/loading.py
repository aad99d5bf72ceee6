"""Building and loading a language model: only the blocks required, and no head unless requested."""

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
"""Tried in this order: causal language models, multimodal models, encoders."""


@dataclass(frozen=True)
class Placement:
    """Devices on which the weights are placed."""

    device: str = "cpu"
    """A torch device for all weights, unless ``device_map`` is given."""
    device_map: str | None = None
    """How transformers spreads them over several devices, e.g. "auto"."""
    max_memory: Mapping[str, str] | None = None
    """Maximum memory per device ("0" is the first GPU, "cpu"), e.g. {"0": "70GiB"}; with ``device_map`` only."""
    offload_folder: str | None = None
    """Folder for weights that fit on no device; with ``device_map`` only."""

    def spread(self, quantized: bool) -> dict[str, Any]:
        """The arguments for ``from_pretrained``; empty for an unquantised model on one device.

        Raises:
            UserError: accelerate is required but not installed, or an option requires a device map and none is given.
        """
        if self.device_map is None and (self.max_memory or self.offload_folder):
            field = "max_memory" if self.max_memory else "offload_folder"
            raise UserError(f'{field}: requires a device map; give device_map too, e.g. "auto"')
        if self.device_map is None and not quantized:
            return {}
        if importlib.util.find_spec("accelerate") is None:
            field = "device_map" if self.device_map else "model: quantised weights"
            raise UserError(f"{field}: requires accelerate; pip install 'dmm-ray[large]'")
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
    """Names of weights missing from its files."""
    placed: dict[str, Any]
    """The device of each module if a device map was used, else empty."""

    def input_device(self, placement: Placement) -> torch.device:
        """The device for token ids: with a device map, the first accelerator in use."""
        if not self.placed:
            return torch.device(placement.device)
        return torch.device(next((d for d in self.placed.values() if d not in ("cpu", "disk")), "cpu"))


def is_quantized(config: Any) -> bool:
    """Whether the model's files hold quantised weights.

    Raises:
        UserError: transformers does not support the quantisation method; it would load the weights as plain numbers.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return False
    from transformers.quantizers import AutoHfQuantizer  # imported here: it is slow, and few models need it

    settings = found if isinstance(found, dict) else found.to_dict()
    if not AutoHfQuantizer.supports_quant_method(settings):
        method = settings.get("quant_method")
        raise UserError(
            f"model: its weights are quantised with {method!r}, which transformers cannot load; "
            "give the model in another format"
        )
    return True


def build_skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The whole model on the meta device, without weights. Raises whatever transformers raises."""
    name = next((name for name in AUTO_CLASSES if _knows(name, config, trust_remote_code)), AUTO_CLASSES[0])
    with torch.device("meta"):
        return getattr(transformers, name).from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )


def is_causal(skeleton: Any) -> bool | None:
    """Whether all attention modules of its text model are causal; None if none has an ``is_causal`` flag."""
    found = (getattr(module, "is_causal", None) for module in text_model(skeleton).modules())
    flags = [flag for flag in found if isinstance(flag, bool)]
    return all(flags) if flags else None


def is_bidirectional(skeleton: Any) -> bool:
    """Whether tokens attend to later ones (an encoder), by its attention modules or else its configuration."""
    causal = is_causal(skeleton)
    if causal is not None:
        return not causal
    if getattr(skeleton.config, "is_decoder", None) is not None:
        return not skeleton.config.is_decoder
    return not _knows(AUTO_CLASSES[0], skeleton.config, True)


def position_offset(model: Any) -> int:
    """The position of the first token: padding_idx + 1 in models that count positions like RoBERTa, else 0."""
    for module in model.modules():
        embedding = getattr(module, "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            return embedding.padding_idx + 1
    return 0


def cut_config(config: Any, n_blocks: int) -> Any:
    """A copy of ``config`` cut to ``n_blocks`` blocks: their number and every list with one entry per block."""
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

    Only those blocks' weights are read if a configuration cut to them builds the same blocks. Otherwise, as for models
    whose blocks depend on the total number of blocks, all are read and the upper ones dropped.

    Args:
        folder: folder of the model's files.
        skeleton: skeleton of the whole model.
        path: path of the blocks inside its text model.
        n_blocks: number of blocks to keep.
        options: passed to ``from_pretrained``.
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
    """The argument that omits an encoder's pooler, for which masked language models have no weights."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature(cls.__init__).parameters else {}


def _same_cut(skeleton: Any, path: str, n_blocks: int) -> Any | None:
    """The configuration cut to ``n_blocks`` if it builds the same modules as ``skeleton`` up to there, else None."""
    base, whole = skeleton.base_model, text_model(skeleton)
    if stated_layers(base.config) != len(whole.get_submodule(path)):
        return None
    cut = cut_config(base.config, n_blocks)
    try:
        with torch.device("meta"):
            part = text_model(type(base)(copy.deepcopy(cut), **_no_pooler(type(base))))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as e:
        logger.info("reading all blocks: %s cannot be built with %d (%s)", type(base).__name__, n_blocks, e)
        return None
    same = len(part.get_submodule(path)) == n_blocks
    return cut if same and _describe(part, path).items() <= _describe(whole, path).items() else None


def _describe(text: nn.Module, path: str) -> dict[str, str]:
    """Describe each module of a text model: its class, the shapes of its own weights and, inside the blocks, its plain
    settings (outside of them, a module may legitimately store the number of blocks)."""
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
    """Whether transformers, or code that comes with the model, maps its configuration to ``auto_class``."""
    remote = trust_remote_code and auto_class in (getattr(config, "auto_map", None) or {})
    return remote or type(config) in getattr(transformers, auto_class)._model_mapping
