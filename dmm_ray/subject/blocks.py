"""Locates a language model's blocks: the text model inside it, and the list of blocks inside that."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmm_ray.errors import UserError

BLOCK_NAMES = (
    "layers",
    "h",
    "blocks",
    "layer",
    "model.layers",
    "decoder.layers",
    "encoder.layers",
    "encoder.layer",
    "transformer.h",
    "transformer.layer",
    "transformer.layers",
    "transformer.blocks",
)
"""Paths where a text model may keep its list of blocks: Llama-like models, GPT-2 and BLOOM, MPT, XLNet,
Llama 4, OPT, encoders such as BERT and DistilBERT, and models that nest a ``transformer``."""


def text_model(model: Any) -> Any:
    """The part of ``model`` that processes text: no language-model head, no vision or audio tower."""
    base = model.base_model
    inner = base.get_decoder() if hasattr(base, "get_decoder") else base
    return getattr(inner, "base_model", inner)


def stated_layers(config: Any) -> int | None:
    """The number of blocks that the text configuration in ``config`` states, if any."""
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def find_blocks(model: Any, block_path: str | None = None) -> str:
    """The dotted path of the list of blocks inside ``text_model(model)``.

    Args:
        model: a language model as loaded by transformers (with its head, if it has one).
        block_path: dotted path of the list in ``model``, for unknown architectures.

    Raises:
        UserError: the architecture is unknown, or ``block_path`` is not a list of modules in the text model.
    """
    text, stated = text_model(model), stated_layers(model.config)
    if block_path:
        return _named_blocks(model, text, block_path)
    for name in BLOCK_NAMES:
        blocks = descend(text, name)
        if isinstance(blocks, nn.ModuleList) and len(blocks) and stated in (None, len(blocks)):
            return name
    lists = _module_lists(model)
    example = lists[0] if lists else "decoder.layers"
    raise UserError(
        f"model: {type(model).__name__} is an unknown architecture; name its list of blocks, "
        f"e.g. --block-path {example}"
    )


def _named_blocks(model: nn.Module, text: nn.Module, block_path: str) -> str:
    """Translate ``block_path``, relative to ``model``, to a path inside ``text``."""
    blocks = descend(model, block_path)
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        for path, module in text.named_modules():
            if module is blocks:
                return path
    there = ", ".join(_module_lists(model)) or "none"
    raise UserError(
        f"block_path: the text model of {type(model).__name__} has no list of blocks at {block_path!r}; "
        f"its module lists are {there}"
    )


def descend(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path of ``model``, or None."""
    module: nn.Module | None = model
    for part in path.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


def _module_lists(model: nn.Module) -> list[str]:
    """Paths of the outermost module lists, longest list first."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[path] = len(module)
    return sorted(found, key=lambda path: -found[path])
