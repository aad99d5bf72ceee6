"""How sequences can share a forward pass so that each yields the same rows as it does alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dmm_ray.subject.intervention import Site, Tokens
from dmm_ray.subject.packing import CannotPackError, changing_lengths, may_pack, packing
from dmm_ray.subject.runner import TRIAL_TOLERANCE, ModelRunner, pad

Batching = Literal["packed", "padded", "alone"]
"""How sequences share a forward pass: packed end to end, padded to the same length, or not at all."""
TRIAL_TOKENS = 24
"""Length of the short sequences used in a trial."""


@torch.no_grad()
def capture_packed(
    runner: ModelRunner, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Outputs (t, d) of blocks ``layers`` for packed sequences. Raises the same as ``SubjectModel.capture_packed``."""
    tokens = torch.tensor([[token for sequence in ids for token in sequence]], device=runner.device)
    lengths = [len(sequence) for sequence in ids]
    with packing(runner.model, lengths, runner.device) as pack:
        positions = pack.positions() + runner.first_position
        sites = [Site(layer) for layer in layers]
        run = runner.forward(tokens, Tokens.of(torch.ones_like(tokens)), sites, position_ids=positions)
    if pack.calls < max(layers) + 1:
        raise CannotPackError(f"{type(runner.model).__name__} uses its own attention implementation")
    return {site.layer: hidden[0] for site, hidden in run.captured.items()}


class BatchingTrials:
    """Finds by trial how a model's sequences can share passes, once per set of lengths that matter."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._changing = changing_lengths(runner.config)
        self._found: dict[tuple[int, ...], Batching] = {}

    @torch.no_grad()
    def batching(self, longest: int) -> Batching:
        """How sequences of at most ``longest`` tokens can share a pass.

        Decided by a trial run on a few sequences: short ones, and ones on either side of every length below ``longest``
        at which, by its configuration, the model's computation changes (LongRoPE's long factors, sparse attention).
        """
        lengths = tuple(n for n in self._changing if n < longest)
        if lengths not in self._found:
            self._found[lengths] = self._try(lengths, longest)
        return self._found[lengths]

    def _try(self, changing: Sequence[int], longest: int) -> Batching:
        runner = self._runner
        layer, short = len(runner.blocks) - 1, min(TRIAL_TOKENS, runner.context)
        around = [
            n for at in changing for n in (min(3 * at, longest), min(2 * at, longest), at + 1, max(at - 3, 2))
        ]
        trial = [runner.trial_ids(n) for n in sorted([short, max(short - 3, 2), 2, *around], reverse=True)]
        alone = [self._block_output([ids], layer)[0] for ids in trial]
        limit = TRIAL_TOLERANCE.get(alone[0].dtype, 0.05)

        def same(found: Sequence[Tensor]) -> bool:
            """Whether every sequence has the same rows as alone, up to rounding."""
            pairs = [(x.float(), y.float()) for x, y in zip(found, alone, strict=True)]
            return all(
                float(((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)).mean()) <= limit
                for x, y in pairs
            )

        if runner.causal and may_pack(runner.config):
            try:
                packed = capture_packed(runner, trial, [layer])[layer]
            # TypeError: forward takes no position_ids; RuntimeError: the model's own mask is too small for the pack
            except (CannotPackError, TypeError, RuntimeError):
                packed = None
            if packed is not None and same(packed.split([len(ids) for ids in trial])):
                return "packed"
        padded = self._block_output(trial, layer)
        return "padded" if same([x[: len(ids)] for x, ids in zip(padded, trial, strict=True)]) else "alone"

    def _block_output(self, ids: Sequence[Sequence[int]], layer: int) -> Tensor:
        """Output (b, t, d) of block ``layer`` for padded sequences that share a pass."""
        input_ids, mask = pad(ids, self._runner.device)
        options = self._runner.padding_options(mask)
        return self._runner.forward(input_ids, Tokens.of(mask), [Site(layer)], **options).captured[
            Site(layer)
        ]
