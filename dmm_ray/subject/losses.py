"""Next-token losses of a language model.

Shapes: b sequences, t tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmm_ray.subject.intervention import Interventions, Tokens
from dmm_ray.subject.runner import ModelRunner

LOGITS_AT_ONCE = 1 << 26
"""Maximum number of logits per pass: tokens times vocabulary size."""


@torch.no_grad()
def token_losses(
    runner: ModelRunner,
    input_ids: Tensor,
    attention_mask: Tensor,
    active: Interventions,
    alone: bool,
) -> Tensor:
    """See ``SubjectModel.token_losses``; with ``alone``, each sequence gets its own pass."""
    tokens = Tokens.of(attention_mask)
    if alone:
        losses = torch.full(input_ids[:, 1:].shape, float("nan"), device=runner.device)
        for row, real in enumerate(tokens.real):
            found = _losses(runner, input_ids[row, real][None], tokens.alone(row), active)
            losses[row, real[1:] & real[:-1]] = found[0]
    else:
        losses = _losses(runner, input_ids, tokens, active, **runner.padding_options(attention_mask))
    return losses.masked_fill(attention_mask[:, 1:] == 0, float("nan"))


def _losses(
    runner: ModelRunner, input_ids: Tensor, tokens: Tokens, active: Interventions, **options: Any
) -> Tensor:
    logits = runner.forward(input_ids, tokens, (), active, **options).output.logits
    # Sequence by sequence: float32 logits of the whole batch would take b times the memory.
    pairs = zip(logits, input_ids, strict=True)
    return torch.stack([F.cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in pairs])


def batches(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Batches of indices of sequences of similar lengths, longest first, whose logits fit into memory together."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] * vocabulary <= LOGITS_AT_ONCE:
            found[-1].append(i)
        else:
            found.append([i])
    return found
