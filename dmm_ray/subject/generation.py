"""Text that a language model writes: a token at a time for one prompt, whole for many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject.decoding import Decoding
from dmm_ray.subject.intervention import Intervention, Interventions
from dmm_ray.subject.reading import REPLACEMENT

if TYPE_CHECKING:
    from dmm_ray.subject.language import LanguageModel

Finish = Literal["stop", "length"]
"""``stop``: the model ended its text; ``length``: a limit was reached."""


class Generated(NamedTuple):
    """A new token."""

    id: int
    text: str
    """The characters that it completes; empty while a character has only begun."""


class Continuation(NamedTuple):
    """What follows a prompt."""

    prompt: list[int]
    """The prompt's token ids."""
    ids: list[int]
    """New tokens."""
    text: str
    """Theirs, without the prompt."""
    finish: Finish


class Generation:
    """An iterator over new tokens after a prompt, until the model ends its text, its context or ``max_tokens``.

    Args:
        model: a language model.
        prompt: not blank.
        interventions: edits; ids of their rows are (0, position).
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token, 1 draws from the model's own distribution.
        seed: of the draws.

    Raises:
        UserError: a blank prompt, or one that fills the context; a model that cannot generate; an edit that fails.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str,
        interventions: Sequence[Intervention] = (),
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        model.require_causal()
        self._model = model
        self._prompt = model.ids_of(prompt)
        self._most = min(max_tokens, model.context - len(self._prompt))
        self._choose = _Chooser(temperature, seed, 0)
        self._active = Interventions(interventions)
        self._batch = Decoding(model, [self._prompt], [0], self._active)
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
    def finish(self) -> Finish:
        """Why it ended."""
        return "length" if len(self.tokens) == self._most else "stop"

    def nats(self) -> list[float]:
        """``-log p`` of each token so far under the model without interventions."""
        [found] = self._model.continuation_nats([self._prompt], [[token.id for token in self.tokens]])
        return found

    def _run(self) -> Iterator[Generated]:
        said = _Text(self._model.tokenizer, self._prompt)
        held: list[
            int
        ] = []  # tokens of a character that has only begun: the last one may have to show what there is
        logits = self._batch.advance()
        for n in range(1, self._most + 1):
            token = self._choose(logits[0])
            if token in self._model.stop_ids:
                break
            text, whole = said.add(token)
            held.append(token)
            if whole:
                yield from (Generated(one, "") for one in held[:-1])
                yield Generated(token, text)
                held = []
            if n < self._most:
                logits = self._batch.advance([token])
        yield from (Generated(one, "") for one in held[:-1])
        yield from (Generated(one, said.rest()) for one in held[-1:])
        self._active.check_effect()


def continue_all(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    names: Sequence[int],
    active: Interventions,
    max_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[Continuation]:
    """Continuations of the prompts, in their order; ``batch_size`` of alike length at a time."""
    found: dict[int, Continuation] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        room = [min(max_tokens, model.context - len(prompts[i])) for i in batch]
        choosers = [_Chooser(temperature, seed, names[i]) for i in batch]
        decoding = Decoding(model, [prompts[i] for i in batch], [names[i] for i in batch], active)
        written, finish = _decode(decoding, choosers, room, model.stop_ids)
        for i, ids, why in zip(batch, written, finish, strict=True):
            said = _Text(model.tokenizer, prompts[i])
            found[i] = Continuation(prompts[i], ids, said.after(ids), why)
    return [found[i] for i in range(len(prompts))]


def _decode(
    decoding: Decoding, choosers: Sequence[_Chooser], room: Sequence[int], stop: frozenset[int]
) -> tuple[list[list[int]], list[Finish]]:
    """New tokens of each sequence, and why it ended. One that has ended stays in the batch, unread, until all have."""
    ids: list[list[int]] = [[] for _ in room]
    finish: list[Finish | None] = [None] * len(room)
    logits = decoding.advance()
    while True:
        tokens = [0] * len(room)
        for i, choose in enumerate(choosers):
            if finish[i] is None:
                tokens[i] = choose(logits[i])
                if tokens[i] in stop:
                    finish[i] = "stop"
                    continue
                ids[i].append(tokens[i])
                if len(ids[i]) == room[i]:
                    finish[i] = "length"
        ended = [why for why in finish if why is not None]
        if len(ended) == len(finish):
            return ids, ended
        logits = decoding.advance(tokens)


class _Chooser:
    """Picks tokens of one sequence by temperature; its draws depend on the seed and the sequence's id alone."""

    def __init__(self, temperature: float, seed: int, sequence: int) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature: 0 or more is needed (got {temperature})")
        self._temperature = temperature
        self._random = numpy_rng(seed, sequence)

    def __call__(self, logits: Tensor) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        logits = logits.double()
        # Less the largest first: over a temperature near 0 the others then become -inf, and none becomes inf / inf.
        p = torch.softmax((logits - logits.max()) / self._temperature, dim=0).cumsum(0).numpy()
        return int(np.searchsorted(p, self._random.random() * p[-1], side="right"))


class _Text:
    """Text of tokens that come one by one; a character made of several tokens appears with its last one."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = len(self._decode(self._ids))

    def add(self, token: int) -> tuple[str, bool]:
        """The characters that ``token`` completes, and whether no character is left that has only begun."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return "", False
        new, self._shown = text[self._shown :], len(text)
        return new, True

    def rest(self) -> str:
        """What is left to show, characters that have only begun included."""
        return self._decode(self._ids)[self._shown :]

    def after(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` after the prompt."""
        return self._decode([*self._ids, *ids])[self._shown :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
