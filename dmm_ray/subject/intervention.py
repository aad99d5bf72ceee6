"""Places in a language model where its state can be read and edited, and edits of it.

Shapes: b sequences, t tokens, n rows, w the width of a site (d for the residual stream and an MLP's output, the width
of one head for a head's output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dmm_ray.errors import UserError

Part = Literal["residual", "mlp", "head"]
Edit = Callable[[Tensor, Tensor], Tensor]
"""From activations (n, w), float32, and their ids (n, 2) int64, (sequence, position), to their replacements (n, w)."""


class Site(NamedTuple):
    """A place in the model.

    Example:
        >>> str(Site(3)), str(Site(3, "head", 1))
        ('layer 3', 'head 1 of layer 3')
    """

    layer: int
    """Decoder block, counted from 0."""
    part: Part = "residual"
    """``residual``: the block's output; ``mlp``: what its MLP adds to the stream; ``head``: one attention head's
    output, that is, its slice of what the attention's output projection reads."""
    head: int | None = None
    """Which head, for ``head``."""

    def __str__(self) -> str:
        if self.part == "head":
            return f"head {self.head} of layer {self.layer}"
        return f"layer {self.layer}" if self.part == "residual" else f"the MLP of layer {self.layer}"


@dataclass(frozen=True)
class Intervention:
    """An edit of the activations at a site.

    ``edit`` gets the activations of real tokens only: no padding, and not position 0 (the BOS or attention sink)
    unless ``first`` is set. It may be called several times for a batch, with any number of rows at a time, so an
    activation's replacement must depend on that activation and its id alone.

    Example:
        >>> halve = Intervention(Site(2), lambda x, ids: x / 2)
    """

    site: Site
    edit: Edit
    prompt: bool = True
    """When generating: edit the prompt's tokens too, not only the activations that predict new tokens."""
    first: bool = False
    """Edit position 0 too."""
    require_effect: bool = False
    """Raise an error if a whole call changed no activation here."""


class Tokens(NamedTuple):
    """Which tokens a forward pass sees."""

    ids: Tensor
    """Sequence and position of each, int64 (b, t, 2)."""
    real: Tensor
    """False at padding, (b, t)."""

    @classmethod
    def of(cls, attention_mask: Tensor, sequences: Sequence[int] | None = None, seen: int = 0) -> Tokens:
        """The tokens of padded sequences.

        Args:
            attention_mask: (b, seen + t), 0 at padding.
            sequences: ids of the b sequences; None: 0 .. b - 1.
            seen: how many of the columns were seen by earlier passes.
        """
        real = attention_mask.bool()
        names = torch.arange(len(real)) if sequences is None else torch.as_tensor(sequences)
        positions = real.long().cumsum(1) - 1
        ids = torch.stack([names.to(positions)[:, None].expand_as(positions), positions], dim=2)
        return cls(ids[:, seen:], real[:, seen:])


class Interventions:
    """Interventions in force during a call, which may take several forward passes, in the order in which they apply.

    Args:
        given: those asked for. At one site they apply one after the other.
    """

    def __init__(self, given: Iterable[Intervention] = ()) -> None:
        self.given = tuple(given)
        self._changed = [False] * len(self.given)

    def apply(self, index: int, hidden: Tensor, tokens: Tokens, predicting: Tensor | None) -> Tensor:
        """What is there after intervention ``index``.

        Args:
            index: into ``given``.
            hidden: (b, t, w).
            tokens: of the pass.
            predicting: (b, t), True where a token predicts a new one; None where nothing is generated.

        Raises:
            UserError: the edit returned another shape, or values that are not finite.
        """
        one = self.given[index]
        chosen = tokens.real if one.first else tokens.real & (tokens.ids[..., 1] > 0)
        if predicting is not None and not one.prompt:
            chosen = chosen & predicting
        ids, at = tokens.ids[chosen], chosen.to(hidden.device)
        before = hidden[at].float().to(ids.device)  # of several devices, the one that the tokens came to
        if not len(before):
            return hidden
        after = one.edit(before.clone(), ids)
        if after.shape != before.shape:
            raise UserError(
                f"intervention at {one.site}: the edit gave {tuple(after.shape)} for {tuple(before.shape)}"
            )
        if not after.isfinite().all():
            sequence, position = ids[(~after.isfinite()).any(1)][0].tolist()
            raise UserError(
                f"intervention at {one.site}: the edit gave NaN or Inf at sequence {sequence}, position {position}"
            )
        edited = hidden.clone()
        edited[at] = after.to(hidden)
        self._changed[index] |= not torch.equal(edited, hidden)
        return edited

    def check_effect(self) -> None:
        """Raises UserError if an intervention that must change something changed nothing."""
        for one, changed in zip(self.given, self._changed, strict=True):
            if one.require_effect and not changed:
                raise UserError(f"intervention at {one.site}: it changed no activation; check the edit")
