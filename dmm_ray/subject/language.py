"""A language model with its head: it writes, alone or in batches, and reads activations as tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.subject.decoding import Decoding, NoCacheError
from dmm_ray.subject.encoding import Chat, render_chat
from dmm_ray.subject.generation import Continuation, continue_all
from dmm_ray.subject.intervention import Intervention, Interventions, Site, Tokens
from dmm_ray.subject.model import SubjectModel
from dmm_ray.subject.reading import TooLongError

logger = logging.getLogger(__name__)
TRIAL_LENGTH, TRIAL_TOLERANCE = 4, 0.05
"""Tokens with which generation is tried out, and by how much, relative to their norm, logits may differ then."""
LOGITS_AT_ONCE = 1 << 26
"""Numbers of the logits of a pass, at most, where all tokens' are needed."""
Prompt = str | Chat | Sequence[int]


class LanguageModel(SubjectModel):
    """A subject with its head. One call at a time."""

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
            raise UserError(f"model: {self.model_id} gives no cache to go on from, which generation needs")

    @cached_property
    def generates(self) -> bool:
        """Whether it predicts the next token from a cache as it does from the whole text: tried with a few tokens."""
        if self.bidirectional or not self.head:
            return False
        ids = self.trial_ids(min(TRIAL_LENGTH, self.context))
        try:
            return self._decodes_alike([ids[:-1]], [ids[-1:]])
        except (TypeError, NoCacheError) as e:
            logger.info("%s cannot generate: %s", self.model_id, e)
            return False

    @cached_property
    def generates_together(self) -> bool:
        """Whether prompts of different lengths can share its passes: tried with a few tokens."""
        ids = self.trial_ids(min(2 * TRIAL_LENGTH, self.context))
        if len(ids) < 4 or self.batching(self.context) == "alone":
            return False
        return self._decodes_alike([ids[:-1], ids[: len(ids) // 2]], [ids[-1:], ids[:1]])

    def _decodes_alike(self, prompts: list[list[int]], last: list[list[int]]) -> bool:
        """Whether prompts that share a pass, and then their last tokens, give the logits of each text alone."""
        together = Decoding(self, prompts)
        together.advance()
        found = together.advance([ids[0] for ids in last])
        for one, prompt, ids in zip(found, prompts, last, strict=True):
            [whole] = Decoding(self, [prompt + ids]).advance()
            if float((one - whole).norm() / whole.norm().clamp_min(1e-12)) > TRIAL_TOLERANCE:
                return False
        return True

    def generate(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention] = (),
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        batch_size: int = 32,
    ) -> list[Continuation]:
        """What follows each prompt, until the model ends the text, its context is full or ``max_tokens``.

        A prompt's text depends on the prompt, its id, the arguments and the seed alone, not on its batch mates (to
        rounding).

        Args:
            prompts: texts, chats or token ids, none of them empty.
            interventions: edits; ids of their rows are (id of the prompt, position).
            max_tokens: most new tokens of each.
            temperature: 0 takes the likeliest token, 1 draws from the model's own distribution.
            seed: of the draws.
            ids: of the prompts, for draws and edits; by default 0, 1, ...
            batch_size: prompts that share a pass, at most; 1 for a model whose sequences cannot share one.

        Raises:
            UserError: a blank prompt, or one that fills the context; a model that cannot generate; as ``capture``.

        Example:
            >>> [one] = model.generate(["Once upon a time"], max_tokens=8)  # doctest: +SKIP
            >>> one.text  # doctest: +SKIP
            ', there was a little girl'
        """
        self.require_causal()
        known = [self.ids_of(prompt) for prompt in prompts]
        names = list(range(len(known))) if ids is None else [int(i) for i in ids]
        active = Interventions(interventions)
        size = batch_size if batch_size == 1 or self.generates_together else 1
        found = continue_all(self, known, names, active, max_tokens, temperature, seed, size)
        active.check_effect()
        return found

    def ids_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises UserError or TooLongError where it is blank or leaves no room."""
        if isinstance(prompt, str):
            ids = self.prompt_ids(prompt, "prompt")
        elif all(isinstance(token, int) for token in prompt):
            ids = [token for token in prompt if isinstance(token, int)]
        else:
            text = render_chat(self.tokenizer, prompt, reply=True)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError("prompt: it holds no tokens; send some words")
        if len(ids) >= self.context:
            raise TooLongError(f"prompt: fills the model's context of {self.context} tokens; shorten it")
        return ids

    @torch.no_grad()
    def continuation_nats(
        self, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """``-log p`` of the tokens ``new`` after each prompt and those between, without interventions."""
        whole = [[*before, *ids] for before, ids in zip(prompts, new, strict=True)]
        found: list[list[float]] = [[] for _ in whole]
        wanted = sorted((i for i in range(len(whole)) if new[i]), key=lambda i: -len(whole[i]))
        while wanted:
            most = LOGITS_AT_ONCE // (len(whole[wanted[0]]) * self.vocabulary)
            batch, wanted = wanted[: max(1, most)], wanted[max(1, most) :]
            losses = self.token_losses(*self.pad([whole[i] for i in batch]))
            for i, row in zip(batch, losses.tolist(), strict=True):
                found[i] = row[len(prompts[i]) - 1 : len(whole[i]) - 1]
        return found

    @torch.no_grad()
    def lens(self, rows: Tensor) -> Tensor:
        """Logits (n, v), float32 on the CPU, of activations (n, d): the logit lens.

        The rows take the place of the last block's output; final norm and unembedding are the model's own.

        Raises:
            UserError: rows so large that the model gives no finite logits for them.
        """
        self.require_causal()
        site = Site(self.n_layers - 1)
        put = Intervention(site, lambda _x, _ids: rows, first=True)
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
        output = self.forward(ids, Tokens.of(torch.ones_like(ids)), (), Interventions([put])).output
        logits = output.logits[:, -1].float().cpu()
        # The norm of a row whose square is beyond float32 makes zeros of it, without a NaN.
        dead = ~(logits.isfinite().all(1) & rows.float().square().sum(1).isfinite().cpu())
        if dead.any():
            raise UserError(
                f"activations: row {int(dead.nonzero()[0])} is too large for the model's final norm"
            )
        return logits

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        stated = [self._model.generation_config, self.source.config.get_text_config(), self.tokenizer]
        found = [getattr(where, "eos_token_id", None) for where in stated]
        return frozenset(
            i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        )
