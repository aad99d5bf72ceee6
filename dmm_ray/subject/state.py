"""State that a model's modules carry from one forward pass to the next, restored before each pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LARGEST = 1 << 16
"""Maximum number of elements in a saved buffer: tables of frequencies are small."""


class _Buffer(NamedTuple):
    """A saved buffer: the tensor, its version counter (in-place writes), and a copy of its values."""

    tensor: Tensor
    version: int
    numbers: Tensor


class ModuleState:
    """A snapshot of every module's small non-persistent buffers and plain attributes.

    Rotary embeddings with dynamic or LongRoPE scaling replace their frequencies by those for the longest sequence so
    far and keep them, so a document's rows would depend on the documents before it.

    Args:
        model: the model whose modules are saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, _buffers(module), _plain(module)) for module in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo whatever forward passes have replaced or written in place."""
        for module, buffers, plain in self._saved:
            for name, (tensor, version, numbers) in buffers.items():
                if module._buffers.get(name) is not tensor:
                    module._buffers[name] = tensor
                if tensor._version != version:
                    tensor.copy_(numbers)
                    buffers[name] = _Buffer(tensor, tensor._version, numbers)
            for name, value in plain.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value


def _buffers(module: nn.Module) -> dict[str, _Buffer]:
    # Persistent buffers (quantised weights are) and large ones (masks) are not state of a pass, and a copy would double
    # their memory. A tensor created in inference mode has no version counter, and nothing can write into it outside of
    # that mode.
    passing = module._non_persistent_buffers_set
    found = {name: t for name, t in module._buffers.items() if name in passing and t is not None}
    return {
        name: _Buffer(t, t._version, t.clone())
        for name, t in found.items()
        if t.numel() <= LARGEST and not t.is_inference()
    }


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are numbers, flags or tensors, except torch's own ``training``."""
    kept = (int, float, bool, Tensor, type(None))
    return {k: v for k, v in vars(module).items() if isinstance(v, kept) and k != "training"}
