"""Text that a language model writes, token by token, with or without steering."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.interventions.language import REPLACEMENT, LanguageModel, TooLongError
from dmm_ray.interventions.steering import Steering
from dmm_ray.seeds import torch_rng


class Generated(NamedTuple):
    """A new token."""

    id: int
    text: str
    """The characters that it completes; empty while a character has only begun."""


class Generation:
    """An iterator over new tokens after a prompt, until the model ends its text, its context or ``max_tokens``.

    Args:
        model: a language model.
        prompt: not blank.
        steering: what is done to each activation that predicts a new token; None: nothing.
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token, 1 draws from the model's own distribution.
        seed: of the draws.

    Raises:
        UserError: a blank prompt, or one that fills the context; a model that cannot generate; a layer it lacks.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str,
        steering: Steering | None = None,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        model.require_causal()
        if steering is not None and not 0 <= steering.block < model.n_layers:
            raise UserError(f"layer: the model has layers 0 to {model.n_layers - 1} (got {steering.block})")
        self._model = model
        self._steering = steering
        self._prompt = model.prompt_ids(prompt)
        if len(self._prompt) >= model.context:
            raise TooLongError(f"prompt: fills the model's context of {model.context} tokens; shorten it")
        self._most = min(max_tokens, model.context - len(self._prompt))
        self._choose = _Chooser(temperature, seed)
        self._steps = self._run()
        self.tokens: list[Generated] = []

    def __iter__(self) -> Iterator[Generated]:
        return self

    def __next__(self) -> Generated:
        self.tokens.append(next(self._steps))
        return self.tokens[-1]

    @property
    def text(self) -> str:
        """What was generated so far, without the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish(self) -> Literal["stop", "length"]:
        """Why it ended: the model ended its text, or a limit was reached."""
        return "length" if len(self.tokens) == self._most else "stop"

    def nats(self) -> list[float]:
        """``-log p`` of each token so far under the model without steering."""
        ids = [token.id for token in self.tokens]
        return self._model.continuation_nats(self._prompt, ids)

    def _run(self) -> Iterator[Generated]:
        layer = 0 if self._steering is None else self._steering.block
        cache: Any = None
        ids, said = self._prompt, _Text(self._model.tokenizer, self._prompt)
        for position in range(len(ids) - 1, len(ids) - 1 + self._most):
            logits, cache = self._model.step(ids, cache, layer, self._steering, position)
            token = self._choose(logits)
            if token in self._model.stop_ids:
                return
            yield Generated(token, said.add(token))
            ids = [token]


class _Chooser:
    """Picks tokens by temperature, from a seeded generator."""

    def __init__(self, temperature: float, seed: int) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature: 0 or more is needed (got {temperature})")
        self._temperature = temperature
        self._random = torch_rng(seed)

    def __call__(self, logits: Tensor) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        logits = logits.double()
        # Less the largest first: over a temperature near 0 the others then become -inf, and none becomes inf / inf.
        p = torch.softmax((logits - logits.max()) / self._temperature, dim=0)
        return int(torch.multinomial(p, 1, generator=self._random))


class _Text:
    """Text of tokens that come one by one; a character made of several tokens appears with its last one."""

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._shown = self._decode()

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
