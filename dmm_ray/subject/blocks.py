"""Where a causal language model keeps its decoder blocks."""

from __future__ import annotations

from torch import nn

from dmm_ray.errors import UserError

BLOCK_PATHS = ("model.layers", "transformer.h")
"""Dotted paths tried in this order: Llama, Qwen, Mistral and their kin; GPT-2 and its kin."""


def find_blocks(model: nn.Module, block_path: str | None = None) -> nn.ModuleList:
    """The list of decoder blocks of ``model``.

    Args:
        model: a causal language model as transformers loads it (with its head).
        block_path: dotted path of the list, for architectures that are not known here.

    Raises:
        UserError: the architecture is unknown, or ``block_path`` is not a list of modules.
    """
    for path in (block_path,) if block_path else BLOCK_PATHS:
        blocks = _descend(model, path)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    name, lists = type(model).__name__, _module_lists(model)
    example = lists[0] if lists else "decoder.layers"
    if block_path:
        there = ", ".join(lists) or "none"
        raise UserError(f"block_path: {name} has no list of blocks at {block_path!r}; it has {there}")
    raise UserError(
        f"model: {name} is an unknown architecture; name its decoder blocks, e.g. --block-path {example}"
    )


def _descend(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _module_lists(model: nn.Module) -> list[str]:
    """Paths of the outermost module lists, longest list first."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[path] = len(module)
    return sorted(found, key=lambda path: -found[path])
