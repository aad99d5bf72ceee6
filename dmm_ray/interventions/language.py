"""A language model used as one: token by token with an edited layer, texts with their characters, the logit lens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from dmm_ray.errors import UserError
from dmm_ray.subject import SubjectModel

logger = logging.getLogger(__name__)
Edit = Callable[[Tensor, int], Tensor]
"""From one activation (d,), float32, and its position to its replacement (d,)."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a part of a character."""


LOGITS_TO_KEEP = "logits_to_keep"
TRIAL_LENGTH, TRIAL_TOLERANCE = 4, 0.05
"""Tokens with which generation is tried out, and by how much, relative to their norm, logits may differ then."""


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


class TooLongError(UserError):
    """A text has more tokens than the model was made for."""


class Piece(NamedTuple):
    """A token and where it stands in its text."""

    id: int
    text: str
    """Its characters; for a special token, its name."""
    start: int
    """First character (Unicode code points), and the one after the last; equal for a special token."""
    end: int


class Reading(NamedTuple):
    """A text as a layer sees it."""

    pieces: list[Piece]
    rows: Tensor
    """The layer's output at every position (t, d), float32, on the CPU."""


class LanguageModel(SubjectModel):
    """A subject with its head, for generation. One call at a time."""

    @classmethod
    def load(
        cls,
        model: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> LanguageModel:
        """The model of a folder or hub id. Raises UserError as ``SubjectModel.from_pretrained``."""
        loaded = cls.from_pretrained(
            model, head=True, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        assert isinstance(loaded, cls)
        return loaded

    def require_causal(self) -> None:
        """Check that it can generate.

        Raises:
            UserError: it predicts no next token, or does so without a key-value cache.
            ValueError: it was not loaded by :meth:`load`.
        """
        if self.bidirectional:
            raise UserError("model: it is an encoder, which predicts no next token; give a causal model")
        if not self.head:
            raise ValueError("generation needs LanguageModel.load(...)")
        if not self.generates:
            raise UserError(
                f"model: {type(self._model).__name__} gives no cache that it goes on from, which generation needs"
            )

    @cached_property
    def generates(self) -> bool:
        """Whether it predicts the next token from a cache as it does from the whole text: tried with a few tokens."""
        if self.bidirectional or not self.head:
            return False
        ids = self.trial_ids(min(TRIAL_LENGTH, self.context))
        try:
            whole, _ = self.step(ids, None, 0, None, 0)
            _, cache = self.step(ids[:-1], None, 0, None, 0)
            found, _ = self.step(ids[-1:], cache, 0, None, 0)
        except (TypeError, NoCacheError) as e:
            logger.info("%s cannot generate: %s", self.model_id, e)
            return False
        return float((found - whole).norm() / whole.norm().clamp_min(1e-12)) <= TRIAL_TOLERANCE

    @torch.no_grad()
    def step(
        self, ids: Sequence[int], cache: Cached | None, layer: int, edit: Edit | None, position: int
    ) -> tuple[Tensor, Cached]:
        """What comes after ``ids``: logits (v,) float32 on the CPU, and the cache for the next step.

        Args:
            ids: the tokens not yet in ``cache``.
            cache: what the last step returned; None at the start.
            layer: the block whose output is edited.
            edit: of the activation of the last of ``ids``; None leaves it. Position 0 is never edited.
            position: of the last of ``ids``.
        """

        def replace(hidden: Tensor) -> Tensor:
            assert edit is not None
            hidden = hidden.clone()
            hidden[0, -1] = edit(hidden[0, -1].float(), position).to(hidden)
            return hidden

        options = self._logits(1) | ({} if cache is None else {cache.name: cache.content})
        with self._hooks({} if edit is None or position == 0 else {layer: replace}):
            run = (
                self._run if cache is None else self._model
            )  # later tokens go on with what the first ones left
            out = run(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=True, **options)
        return out.logits[0, -1].float().cpu(), Cached.of(out)

    @torch.no_grad()
    def continuation_nats(self, before: Sequence[int], ids: Sequence[int]) -> list[float]:
        """``-log p`` of each of ``ids`` after the tokens ``before`` and those between."""
        if not ids:
            return []
        tokens = torch.tensor([[*before, *ids]], device=self.device)
        out = self._run(input_ids=tokens, **self._logits(len(ids) + 1))
        predicting = out.logits[0, -len(ids) - 1 : -1].float()
        return F.cross_entropy(predicting, tokens[0, -len(ids) :], reduction="none").tolist()

    @torch.no_grad()
    def read(self, text: str, layer: int) -> Reading:
        """The tokens of ``text`` and the layer's output at each.

        Raises:
            TooLongError: more tokens than the model's context.
            UserError: a text without tokens, a layer the model lacks, or a tokenizer without character offsets.
        """
        pieces = self.pieces(text)
        ids = torch.tensor([[piece.id for piece in pieces]], device=self.device)
        options = self._logits(1)
        with self._capturing([layer], ids.shape) as captured:
            self._run(input_ids=ids, **options)
        return Reading(pieces, captured[layer][0].float().cpu())

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of ``text``, special ones included, as extraction makes them. Raises as :meth:`read`."""
        ids = self.prompt_ids(text)
        if not self.tokenizer.is_fast:
            raise UserError("model: its tokenizer gives no character offsets; use another")
        spans = self.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        spans = spans[len(spans) - len(ids) :]  # a text that begins with the special token itself has it once
        pieces = [Piece(token, text[a:b], a, b) for token, (a, b) in zip(ids, spans, strict=True)]
        return [piece if piece.text else piece._replace(text=self.token_text(piece.id)) for piece in pieces]

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of ``text``, special ones included, not cut. Raises UserError or TooLongError as :meth:`read`."""
        [ids] = self.tokenize([text], self.context + 1)
        if not ids:
            raise UserError("text: it holds no tokens; send some words")
        if len(ids) > self.context:
            raise TooLongError(
                f"text: more tokens than the model's context of {self.context}; send it in parts"
            )
        return ids

    @torch.no_grad()
    def lens(self, rows: Tensor) -> Tensor:
        """Logits (n, v), float32 on the CPU, of activations (n, d): the logit lens.

        The rows take the place of the last block's output; final norm and unembedding are the model's own.
        """

        def replace(hidden: Tensor) -> Tensor:
            return rows[:, None].to(hidden)

        self.require_causal()
        with self._hooks({self.n_layers - 1: replace}):
            ids = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
            return self._run(input_ids=ids).logits[:, -1].float().cpu()

    def token_text(self, token: int) -> str:
        """A token's characters; its name in the vocabulary where it is part of a character, or special."""
        text = self.tokenizer.decode([token], skip_special_tokens=True)
        return self.tokenizer.convert_ids_to_tokens(token) if not text or REPLACEMENT in text else text

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        stated = [self._model.generation_config, self.source.config.get_text_config(), self.tokenizer]
        found = [getattr(where, "eos_token_id", None) for where in stated]
        return frozenset(
            i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        )

    def _logits(self, last: int) -> dict[str, Any]:
        """The argument that has logits computed for the last tokens only, where the model has one. Call it outside of
        hooks: it may try the model out."""
        return {LOGITS_TO_KEEP: last} if self._keeps_logits else {}

    @cached_property
    @torch.no_grad()
    def _keeps_logits(self) -> bool:
        """Whether it can be told to give the last logits only: tried."""
        ids = torch.tensor([self.trial_ids(2)], device=self.device)
        try:
            logits = self._run(input_ids=ids, **{LOGITS_TO_KEEP: 1}).logits
        except (TypeError, AttributeError):  # no such argument; no logits
            return False
        return logits.shape[1] == 1
