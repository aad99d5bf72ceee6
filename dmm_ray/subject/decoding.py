"""Token-by-token decoding of a batch of sequences.

Shapes: b sequences, t tokens, v the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from dmm_ray.errors import UserError
from dmm_ray.subject.intervention import Interventions, Tokens
from dmm_ray.subject.runner import TRIAL_TOLERANCE, ModelRunner, pad

logger = logging.getLogger(__name__)
TRIAL_LENGTH = 4
"""Number of tokens used to try out generation."""


class NoCacheError(Exception):
    """A model's output contains no key-value cache to continue from."""


class Cached(NamedTuple):
    """A model's key-value cache of the tokens so far."""

    name: str
    """Name of both the output field that returns it and the argument that takes it; depends on the version of
    transformers."""
    content: Cache

    @classmethod
    def of(cls, output: Any) -> Cached:
        """The cache in a model's output. Raises NoCacheError if there is none."""
        for name, value in output.items():
            if isinstance(value, Cache):
                return cls(name, value)
        raise NoCacheError(f"its output contains {', '.join(output)} but no cache")


class Decoding:
    """A batch of b sequences being continued.

    Prompts of different lengths are padded on the left, so that all of them continue at the same column; each keeps the
    positions it would have alone.

    Args:
        runner: a model with its head.
        prompts: token ids of each prompt, at least one.
        sequences: sequence ids passed to interventions; defaults to 0 .. b - 1.
        active: interventions to apply.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prompts: Sequence[Sequence[int]],
        sequences: Sequence[int] | None = None,
        active: Interventions | None = None,
    ) -> None:
        self._runner = runner
        self._sequences = list(range(len(prompts))) if sequences is None else sequences
        self._active = active
        input_ids, mask = pad(prompts, runner.device)
        shift = mask.sum(1, keepdim=True)  # roll each row so that its padding comes first
        order = (torch.arange(mask.shape[1], device=mask.device) + shift) % mask.shape[1]
        self._next, self._mask = input_ids.gather(1, order), mask.gather(1, order)
        self._seen = 0
        self._cached: Cached | None = None

    @torch.no_grad()
    def advance(self, tokens: Sequence[int | None] | None = None) -> Tensor:
        """Logits (b, v), float32, for the next token of each sequence.

        Args:
            tokens: the token to append to each sequence, or None for one that has ended (its logits are meaningless);
                omitted in the first call.

        Raises:
            NoCacheError: the model returns no cache.
            UserError: an edit fails, or the model outputs NaN or Inf for an active sequence.
        """
        going = torch.ones_like(self._mask[:, :1])
        if tokens is not None:
            device = self._mask.device
            self._next = torch.tensor([[token or 0] for token in tokens], device=device)
            # A sequence that has ended is padded from now on: no edit sees it, and its position stays in range.
            going = torch.tensor([[int(token is not None)] for token in tokens], device=device)
            self._mask = torch.cat([self._mask, going], dim=1)
        these = Tokens.of(self._mask, self._sequences, self._seen)
        predicting = torch.zeros_like(these.real)
        predicting[:, -1] = True
        options = self._runner.last_logits(1) | self._runner.padding_options(self._mask, self._seen)
        if self._cached is not None:
            options[self._cached.name] = self._cached.content
        later = self._cached is not None
        output = self._runner.forward(
            self._next, these, (), self._active, later=later, predicting=predicting, use_cache=True, **options
        ).output
        self._cached = Cached.of(output)
        self._seen = self._mask.shape[1]
        logits = output.logits[:, -1].float()
        self._check(logits, these.ids[:, -1], going[:, 0])
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the sequences at ``rows``, in ascending order, and drop the others from the batch."""
        assert self._cached is not None
        at = torch.tensor(rows, device=self._mask.device)
        self._cached.content.reorder_cache(
            at
        )  # written for beam search, so every cache has it; fewer rows than before work, too
        self._mask = self._mask[at]
        self._sequences = [self._sequences[row] for row in rows]

    def _check(self, logits: Tensor, ids: Tensor, going: Tensor) -> None:
        # Models use -inf to rule out a token, so test the maximum: it exposes NaN and +inf.
        broken = ~logits.amax(1).isfinite() & going.bool()
        if broken.any():
            sequence, position = ids[broken.nonzero()[0, 0]].tolist()
            raise UserError(
                f"model: {self._runner.name} outputs NaN or Inf for the token after sequence {sequence}, position "
                f"{position}; check its weights for NaN or Inf, or use weaker interventions"
            )


class DecodingTrials:
    """What a model supports during generation; each capability is tried once, with a few tokens.

    Args:
        runner: a model with its head.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    @cached_property
    def continues(self) -> bool:
        """Whether the model predicts the same from a cache as from the full text."""
        *prompt, token = self._runner.trial_ids(min(TRIAL_LENGTH, self._runner.context))
        try:
            return self._as_alone([prompt], [token])
        except (TypeError, NoCacheError) as e:  # forward takes no cache; forward returns none
            logger.info("%s cannot generate: %s", self._runner.name, e)
            return False

    @cached_property
    def together(self) -> bool:
        """Whether prompts of different lengths can share forward passes."""
        return self.continues and self._as_alone(*self._mixed)

    @cached_property
    def drops(self) -> bool:
        """Whether sequences can leave the batch before the others."""
        try:
            return self.together and self._as_alone(*self._mixed, keep=[1])
        except (NotImplementedError, RuntimeError, IndexError):  # a custom cache class
            return False

    @property
    def _mixed(self) -> tuple[list[list[int]], list[int]]:
        *long, token = self._runner.trial_ids(min(2 * TRIAL_LENGTH, self._runner.context))
        return [long, long[: len(long) // 2]], [token, long[0]]

    def _as_alone(self, prompts: list[list[int]], tokens: list[int], keep: Sequence[int] = ()) -> bool:
        """Whether prompts that share a pass, followed by one token each, give the same logits as each text alone."""
        together = Decoding(self._runner, prompts)
        together.advance()
        if keep:
            together.keep(keep)
            prompts, tokens = [prompts[i] for i in keep], [tokens[i] for i in keep]
        limit = TRIAL_TOLERANCE.get(next(self._runner.model.parameters()).dtype, 0.05)
        for one, prompt, token in zip(together.advance(tokens), prompts, tokens, strict=True):
            [whole] = Decoding(self._runner, [[*prompt, token]]).advance()
            if float((one - whole).norm() / whole.norm().clamp_min(1e-12)) > limit:
                return False
        return True
