"""Sequences that a language model goes on with, token by token, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from dmm_ray.subject.intervention import Interventions, Tokens

if TYPE_CHECKING:
    from dmm_ray.subject.model import SubjectModel


class NoCacheError(Exception):
    """A model's output holds nothing that it could go on from."""


class Cached(NamedTuple):
    """What a model remembers of the tokens so far."""

    name: str
    """Of the output that holds it and of the argument that takes it: alike, and not the same in every version of
    transformers."""
    content: Cache

    @classmethod
    def of(cls, output: Any) -> Cached:
        """The cache in a model's output. Raises NoCacheError where there is none."""
        for name, value in output.items():
            if isinstance(value, Cache):
                return cls(name, value)
        raise NoCacheError(f"its output holds {', '.join(output)} and no cache")


class Decoding:
    """A batch of b sequences under way.

    Prompts of different lengths are padded on the left, so that all of them end, and go on, at the same column; each
    keeps the positions that it has alone.

    Args:
        model: with its head.
        prompts: token ids of each, at least one.
        sequences: their ids, for interventions; by default 0 .. b - 1.
        active: edits in force.
    """

    def __init__(
        self,
        model: SubjectModel,
        prompts: Sequence[Sequence[int]],
        sequences: Sequence[int] | None = None,
        active: Interventions | None = None,
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._active = active
        input_ids, mask = model.pad(prompts)
        shift = mask.sum(1, keepdim=True)  # roll each row so that its padding comes first
        order = (torch.arange(mask.shape[1], device=mask.device) + shift) % mask.shape[1]
        self._next, self._mask = input_ids.gather(1, order), mask.gather(1, order)
        self._seen = 0
        self._cached: Cached | None = None

    @torch.no_grad()
    def advance(self, tokens: Sequence[int] | None = None) -> Tensor:
        """Logits (b, v), float32 on the CPU, of what comes next.

        Args:
            tokens: one more for each sequence; None at the start.

        Raises:
            NoCacheError: the model gives no cache.
        """
        if tokens is not None:
            self._next = torch.tensor(tokens, device=self._mask.device)[:, None]
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        who = Tokens.of(self._mask, self._sequences, self._seen)
        predicting = torch.zeros_like(who.real)
        predicting[:, -1] = True
        options = self._model.last_logits(1) | self._model.padding_options(self._mask, self._seen)
        if self._cached is not None:
            options[self._cached.name] = self._cached.content
        later = self._cached is not None
        output = self._model.forward(
            self._next, who, (), self._active, later=later, predicting=predicting, use_cache=True, **options
        ).output
        self._cached = Cached.of(output)
        self._seen = self._mask.shape[1]
        return output.logits[:, -1].float().cpu()
