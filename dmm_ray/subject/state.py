"""What a model's modules remember from one forward pass to the next, put back before each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LARGEST = 1 << 16
"""Numbers of a buffer that is remembered, at most: tables of frequencies are small."""


class _Buffer(NamedTuple):
    """A buffer as it was: the tensor, how often it had been written in place, and its numbers."""

    tensor: Tensor
    version: int
    numbers: Tensor


class ModuleState:
    """Small buffers that are not saved with the model, and plain attributes, of every module as they are now.

    Rotary embeddings of dynamic and LongRoPE scaling replace their frequencies by those of the longest sequence so far
    and keep them: what a document gives would depend on those before it.

    Args:
        model: whose modules are remembered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, _buffers(module), _plain(module)) for module in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what a forward pass has replaced or written into."""
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
    # Buffers that are saved with the model (quantised weights are) and large ones (masks) are no state of a pass, and a
    # copy would take as much memory again. A tensor made in inference mode counts no versions, and nothing can write
    # into it outside of that mode.
    passing = module._non_persistent_buffers_set
    found = {name: t for name, t in module._buffers.items() if name in passing and t is not None}
    return {
        name: _Buffer(t, t._version, t.clone())
        for name, t in found.items()
        if t.numel() <= LARGEST and not t.is_inference()
    }


def _plain(module: nn.Module) -> dict[str, Any]:
    """Numbers, flags and tensors that are attributes; ``training`` is torch's own."""
    kept = (int, float, bool, Tensor, type(None))
    return {k: v for k, v in vars(module).items() if isinstance(v, kept) and k != "training"}
