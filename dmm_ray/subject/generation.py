"""Text generation: token by token for one prompt, or complete continuations for many.

Shapes: b sequences, v the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmm_ray.arguments import as_integer, as_number
from dmm_ray.errors import UserError
from dmm_ray.seeds import numpy_rng
from dmm_ray.subject.decoding import Decoding
from dmm_ray.subject.intervention import Intervention, Interventions
from dmm_ray.subject.reading import REPLACEMENT, Prompt

if TYPE_CHECKING:
    from dmm_ray.subject.model import SubjectModel

Finish = Literal["stop", "length"]
"""``stop``: the model ended its text; ``length``: a limit was reached."""


class Generated(NamedTuple):
    """A generated token."""

    id: int
    text: str
    """The characters that it completes; empty if it leaves a character incomplete."""


class Continuation(NamedTuple):
    """What follows a prompt."""

    prompt: list[int]
    """The prompt's token ids."""
    ids: list[int]
    """The new tokens."""
    text: str
    """The text of the new tokens, without the prompt."""
    finish: Finish


class Generation:
    """An iterator over the new tokens after a prompt, until the model ends its text or the context or ``max_tokens`` is
    reached.

    Args:
        model: a model with its head.
        prompt: a text, a chat or token ids, not blank.
        interventions: edits; the ids of their rows are (0, position).
        max_tokens: maximum number of new tokens.
        temperature: 0 takes the likeliest token, 1 samples from the model's own distribution.
        seed: seed of the sampling.
        require_effect: raise an error at the end if an intervention has changed nothing.

    Raises:
        UserError: the prompt is blank or fills the context, the model cannot generate, or an edit fails.

    Example:
        >>> [token.text for token in Generation(subject, "Once upon a time", max_tokens=3)]
        [',', ' two', ' g']
    """

    def __init__(
        self,
        model: SubjectModel,
        prompt: Prompt,
        interventions: Sequence[Intervention] = (),
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        require_effect: bool = False,
    ) -> None:
        model.require_generation()
        self._model = model
        self._prompt = model.prompt_ids(prompt)
        self._most = min(as_integer("max_tokens", max_tokens, least=1), model.context - len(self._prompt))
        self._active = Interventions(interventions, require_effect)
        decoding = Decoding(model.runner, [self._prompt], [0], self._active)
        sampler = _Sampler([as_number("temperature", temperature)], seed, [0])
        self._steps = self._run(_decode(decoding, sampler, [self._most], model.stop_ids, drops=False))
        self.tokens: list[Generated] = []

    def __iter__(self) -> Iterator[Generated]:
        return self

    def __next__(self) -> Generated:
        self.tokens.append(next(self._steps))
        return self.tokens[-1]

    @property
    def text(self) -> str:
        """The text generated so far, without the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish(self) -> Finish:
        """Why generation ended."""
        return "length" if len(self.tokens) == self._most else "stop"

    def nats(self) -> list[float]:
        """``-log p`` of each token generated so far under the model without interventions."""
        [found] = self._model.continuation_nats([self._prompt], [[token.id for token in self.tokens]])
        return found

    def _run(self, steps: Iterator[list[int | None]]) -> Iterator[Generated]:
        written = _Text(self._model.tokenizer, self._prompt)
        # Hold back a token that leaves a character incomplete: if it turns out to be the last, it must carry the rest.
        unfinished: int | None = None
        for [token] in steps:
            if token is None:
                break
            if unfinished is not None:
                yield Generated(unfinished, "")
            text = written.add(token)
            unfinished = token if text is None else None
            if text is not None:
                yield Generated(token, text)
        if unfinished is not None:
            yield Generated(unfinished, written.rest())
        self._active.check_effect()


class Sampling(NamedTuple):
    """How the tokens of several prompts are chosen."""

    ids: list[int]
    """Id of each prompt, for sampling and edits."""
    temperatures: list[float]
    """Temperature of each prompt."""
    max_tokens: int
    seed: int

    @classmethod
    def of(
        cls,
        n: int,
        max_tokens: int,
        temperature: float | Sequence[float],
        seed: int,
        ids: Sequence[int] | None,
    ) -> Sampling:
        """Validate the arguments for ``n`` prompts. Raises UserError if one is invalid."""
        names = list(range(n)) if ids is None else [as_integer("ids", i) for i in ids]
        each = temperature if isinstance(temperature, Sequence | np.ndarray) else [temperature] * n
        temperatures = [as_number("temperature", one) for one in each]
        for name, values in (("ids", names), ("temperature", temperatures)):
            if len(values) != n:
                raise UserError(f"{name}: expected one for each of the {n} prompts (got {len(values)})")
        return cls(names, temperatures, as_integer("max_tokens", max_tokens, least=1), seed)


def generate(
    model: SubjectModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    active: Interventions,
    batch_size: int,
) -> list[Continuation]:
    """Continuations of the prompts, in the same order; see ``SubjectModel.generate``."""
    ids, limits = sampling.ids, [min(sampling.max_tokens, model.context - len(one)) for one in prompts]
    longest = max((len(one) + limit for one, limit in zip(prompts, limits, strict=True)), default=0)
    trials = model.decoding_trials
    together = batch_size > 1 and trials.together and model.batching(longest) != "alone"
    found: dict[int, Continuation] = {}
    for batch in _batches(prompts, limits, model.context, batch_size if together else 1):
        decoding = Decoding(model.runner, [prompts[i] for i in batch], [ids[i] for i in batch], active)
        temperatures = [sampling.temperatures[i] for i in batch]
        sampler = _Sampler(temperatures, sampling.seed, [ids[i] for i in batch])
        new: list[list[int]] = [[] for _ in batch]
        drops = len(batch) > 1 and trials.drops
        for step in _decode(decoding, sampler, [limits[i] for i in batch], model.stop_ids, drops):
            for tokens, token in zip(new, step, strict=True):
                if token is not None:
                    tokens.append(token)
        for i, tokens in zip(batch, new, strict=True):
            text = _Text(model.tokenizer, prompts[i]).after(tokens)
            finish: Finish = "length" if len(tokens) == limits[i] else "stop"
            found[i] = Continuation(prompts[i], tokens, text, finish)
    return [found[i] for i in range(len(prompts))]


def _batches(
    prompts: Sequence[list[int]], limits: Sequence[int], context: int, size: int
) -> Iterator[list[int]]:
    """Batches of indices of prompts of similar lengths.

    A batch is padded to its longest prompt and continued to its largest limit, and that sum stays within the context: a
    model may have no bias or mask for more columns (MPT).
    """
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        columns = len(prompts[i]) + max(limits[j] for j in (*batch, i))
        if len(batch) == size or (batch and columns > context):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _decode(
    decoding: Decoding, sampler: _Sampler, limits: Sequence[int], stop: frozenset[int], drops: bool
) -> Iterator[list[int | None]]:
    """New tokens of the sequences, step by step; None for one that has ended, by a token of ``stop`` or its limit.

    If the model's cache supports it, sequences that have ended are dropped once they make up half of the batch;
    otherwise they stay and are ignored. (Dropping each one immediately would copy the cache every time.)
    """
    left = list(limits)
    batch = list(range(len(left)))  # the sequence in each row of the batch
    logits = decoding.advance()
    while True:
        step: list[int | None] = [None] * len(left)
        for i, token in zip(batch, sampler.draw(logits, batch), strict=True):
            if left[i] and token in stop:
                left[i] = 0
            elif left[i]:
                left[i] -= 1
                step[i] = token
        yield step
        going = [row for row, i in enumerate(batch) if left[i]]
        if not going:
            return
        if drops and 2 * len(going) <= len(batch):
            decoding.keep(going)
            batch = [batch[row] for row in going]
        logits = decoding.advance([step[i] if left[i] else None for i in batch])


class _Sampler:
    """Samples the next tokens of a batch; a sequence's random numbers depend on the seed and its id alone."""

    def __init__(self, temperatures: Sequence[float], seed: int, ids: Sequence[int]) -> None:
        for temperature in temperatures:
            if not 0 <= temperature < math.inf:
                raise UserError(f"temperature: must be finite and at least 0 (got {temperature})")
        self._temperatures = torch.tensor(temperatures, dtype=torch.float64)[:, None]
        self._random = [numpy_rng(seed, i) for i in ids]

    def draw(self, logits: Tensor, batch: Sequence[int]) -> list[int]:
        """Tokens (b,) sampled from softmax(logits / temperature); the likeliest ones at temperature 0.

        Args:
            logits: (b, v).
            batch: index of the sequence in each row.
        """
        greedy, temperatures = logits.argmax(1), self._temperatures[list(batch)].to(logits.device)
        if not temperatures.any():
            return greedy.tolist()
        uniform = torch.tensor([[self._random[i].random()] for i in batch], dtype=torch.float64)
        # Subtract the maximum first: at temperatures near 0 the others become -inf, and none becomes inf - inf.
        scaled = (logits.double() - logits.amax(1, keepdim=True)) / temperatures.where(temperatures > 0, 1)
        sums = torch.softmax(scaled, dim=1).cumsum(1)
        drawn = torch.searchsorted(sums, uniform.to(logits.device) * sums[:, -1:], right=True)
        drawn = drawn.clamp(max=logits.shape[1] - 1)[:, 0]
        return drawn.where(temperatures[:, 0] > 0, greedy).tolist()


class _Text:
    """Decodes tokens one by one; a character made of several tokens appears with the last of them."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = len(self._decode(self._ids))

    def add(self, token: int) -> str | None:
        """The characters that ``token`` completes; None if it leaves a character incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return None
        new, self._shown = text[self._shown :], len(text)
        return new

    def rest(self) -> str:
        """The text not returned yet, including incomplete characters."""
        return self._decode(self._ids)[self._shown :]

    def after(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` after the prompt."""
        return self._decode([*self._ids, *ids])[self._shown :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
