"""Several sequences in one row without padding: attention stays within each, and positions restart in each.

During a packed forward pass, attention is replaced through transformers' ``AttentionInterface``. A model that does not
use that interface, or needs anything but causal or sliding-window softmax attention, cannot be packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "dmm_packed"
SHARED_LENGTH = 512
"""Sequences shorter than this share one attention call with others of similar length."""
ALIKE = 0.75
"""Minimum length of a sequence in a shared call, relative to the longest."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class CannotPackError(Exception):
    """The model's kind of attention is not supported by packing."""


@dataclass
class Pack:
    """Sequences packed end to end, longest first: t tokens in one row."""

    lengths: Sequence[int]
    device: torch.device
    calls: int = 0
    """Number of attention calls made on this pack so far."""
    groups: list[tuple[Tensor | slice, Tensor | None]] = field(init=False)
    """Sequences that share a call: (n, longest) token indices and which of them are real, or a slice for just one."""

    def __post_init__(self) -> None:
        self.groups = [self._group(*bounds) for bounds in _alike(self.lengths)]

    def positions(self) -> Tensor:
        """(1, t) int64: each token's position in its own sequence."""
        lengths = torch.tensor(self.lengths)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return (torch.arange(len(starts)) - starts)[None].to(self.device)

    def _group(self, low: int, high: int) -> tuple[Tensor | slice, Tensor | None]:
        start = sum(self.lengths[:low])
        if high - low == 1:
            return slice(start, start + self.lengths[low]), None
        lengths = torch.tensor(self.lengths[low:high])
        column = torch.arange(int(lengths[0]))[None]
        index = (start + lengths.cumsum(0) - lengths)[:, None] + column
        # Padding columns may point past the group: clamp them to valid indices; the mask discards their results.
        last = start + int(lengths.sum()) - 1
        return index.clamp(max=last).to(self.device), (column < lengths[:, None]).to(self.device)


def _alike(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bounds of runs of sequences of similar length; each long one forms its own run."""
    low = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[low] >= SHARED_LENGTH or lengths[i] < ALIKE * lengths[low]:
            yield low, i
            low = i


_current: ContextVar[Pack | None] = ContextVar("pack", default=None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over a pack: query (1, heads, t, head width), key and value with as many heads or a divisor of it.

    Returns (1, t, heads, head width), as transformers expects.

    Raises:
        CannotPackError: the model uses soft capping, sinks, a bias or its own mask.
    """
    pack = _current.get()
    assert pack is not None, "packed attention outside of a packed forward pass"
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    if wanted or attention_mask is not None or not causal or len(query) != 1:
        raise CannotPackError(f"{type(module).__name__} requires {wanted or 'its own mask'}")
    pack.calls += 1
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for where, real in pack.groups:
        q, k, v = (_gather(x, where) for x in (query, key, value))
        mask = _band(q.shape[2], sliding_window, q.device)
        part = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        if isinstance(where, slice):
            out[:, :, where] = part
        else:
            out[0][:, where[real]] = part.transpose(0, 1)[:, real]
    return out.transpose(1, 2).contiguous(), None


@cache
def _register() -> None:
    # Imported here: it pulls in everything transformers' models need (3 s), and most processes load no model.
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def _gather(x: Tensor, where: Tensor | slice) -> Tensor:
    """The group's tokens, (n, heads, length, width). Padding is on the right, where causal attention never sees it."""
    return x[:, :, where] if isinstance(where, slice) else x[0][:, where].transpose(0, 1)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask (length, length) of sliding-window attention; None if the window covers the whole sequence."""
    if window is None or length <= window:
        return None
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (behind >= 0) & (behind < window)


@contextmanager
def packing(model: nn.Module, lengths: Sequence[int], device: torch.device) -> Iterator[Pack]:
    """Context in which ``model`` runs with packed attention over sequences of ``lengths``, longest first."""
    _register()
    pack = Pack(lengths, device)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _current.set(pack)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield pack
    finally:
        _current.reset(token)
        for key, config in configs.items():
            config._attn_implementation = before[key]


def changing_lengths(config: Any) -> list[int]:
    """Sequence lengths beyond which a model of ``config`` may compute differently, ascending: attention windows, and
    maximum lengths, including the one before context extension."""
    found: set[int] = set()

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, str(key))
        elif type(value) is int and value > 1 and ("window" in name or "max_position" in name):
            found.add(value)

    look(config.to_dict(), "")
    return sorted(found)


def may_pack(config: Any) -> bool:
    """Whether nothing in the text model's ``config`` rules out packing; a trial has the final say."""
    known = set(getattr(config, "layer_types", None) or ()) <= KNOWN_LAYERS
    biased = getattr(config, "alibi", False) or getattr(config, "attention_chunk_size", None)
    return known and not biased
