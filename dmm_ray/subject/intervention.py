"""Sites in a language model where activations can be read and edited, and the edits.

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
"""Maps activations (n, w), float32, and their ids (n, 2), int64 (sequence, position), to replacements (n, w)."""


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
    """Index of the head, for part ``head``."""

    def __str__(self) -> str:
        if self.part == "head":
            return f"head {self.head} of layer {self.layer}"
        return f"layer {self.layer}" if self.part == "residual" else f"the MLP of layer {self.layer}"


@dataclass(frozen=True)
class Intervention:
    """An edit of the activations at a site.

    ``edit`` receives the activations of real tokens only: no padding, and not position 0 (the BOS or attention sink)
    unless ``first`` is set. It may be called several times per batch, with any number of rows at a time, so an
    activation's replacement must depend on that activation and its id alone.

    Example:
        >>> halve = Intervention(Site(2), lambda x, ids: x / 2)
    """

    site: Site
    edit: Edit
    prompt: bool = True
    """During generation, edit the prompt's tokens too, not only the activations that predict new tokens."""
    first: bool = False
    """Edit position 0 too."""


class Tokens(NamedTuple):
    """The tokens of a forward pass."""

    ids: Tensor
    """Sequence and position of each token, int64 (b, t, 2)."""
    real: Tensor
    """False at padding, (b, t)."""

    @classmethod
    def of(cls, attention_mask: Tensor, sequences: Sequence[int] | None = None, seen: int = 0) -> Tokens:
        """The tokens of padded sequences.

        Args:
            attention_mask: (b, seen + t), 0 at padding.
            sequences: ids of the b sequences; None for 0 .. b - 1.
            seen: number of columns that earlier passes have processed.
        """
        real = attention_mask.bool()
        names = torch.arange(len(real)) if sequences is None else torch.as_tensor(sequences)
        positions = real.long().cumsum(1) - 1
        ids = torch.stack([names.to(positions)[:, None].expand_as(positions), positions], dim=2)
        return cls(ids[:, seen:], real[:, seen:])

    def alone(self, row: int) -> Tokens:
        """The real tokens of one sequence, as a batch of one."""
        real = self.real[row]
        return Tokens(self.ids[row, real][None], real[real][None])


class Interventions:
    """The interventions of one call, which may take several forward passes.

    Args:
        given: the interventions; those at the same site apply in this order.
        require_effect: each of them must change at least one activation.
    """

    def __init__(self, given: Iterable[Intervention] = (), require_effect: bool = False) -> None:
        self.given = tuple(given)
        self.require_effect = require_effect
        self._seen = [0] * len(self.given)
        self._changed = [False] * len(self.given)

    def apply(self, index: int, hidden: Tensor, tokens: Tokens, predicting: Tensor | None) -> Tensor:
        """Apply intervention ``index`` to the activations at its site.

        Args:
            index: into ``given``.
            hidden: (b, t, w).
            tokens: the tokens of the pass.
            predicting: (b, t), True where a token predicts a new one; None outside of generation.

        Raises:
            UserError: the edit returned a wrong shape, or NaN or Inf.
        """
        one = self.given[index]
        chosen = tokens.real if one.first else tokens.real & (tokens.ids[..., 1] > 0)
        if predicting is not None and not one.prompt:
            chosen = chosen & predicting
        ids, at = tokens.ids[chosen], chosen.to(hidden.device)
        rows = hidden[at]
        if not len(rows):
            return hidden
        # With a device map, a block may be on another device than the token ids; the edit gets both on the same one.
        new = one.edit(rows.to(ids.device, torch.float32, copy=True), ids)
        _check(one.site, rows, new, ids)
        edited = hidden.clone()
        edited[at] = new.to(hidden)
        self._seen[index] += len(rows)
        self._changed[index] |= not torch.equal(edited, hidden)
        return edited

    def check_effect(self) -> None:
        """Raises UserError if an effect is required and an intervention changed nothing."""
        for one, seen, changed in zip(self.given, self._seen, self._changed, strict=True):
            if self.require_effect and not changed:
                raise UserError(
                    f"intervention at {one.site}: it changed none of the {seen} activations it received"
                )


def _check(site: Site, rows: Tensor, new: object, ids: Tensor) -> None:
    """Raises UserError unless ``new`` can replace ``rows`` (n, w)."""

    def where(row: int) -> str:
        sequence, position = ids[row].tolist()
        return f"sequence {sequence}, position {position}"

    if not isinstance(new, Tensor) or new.shape != rows.shape:
        returned = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise UserError(
            f"intervention at {site}: the edit returned {returned} for {len(rows)} activations of shape "
            f"{tuple(rows.shape)}, the first at {where(0)}; return a tensor of the same shape"
        )
    # Check in the model's dtype, whose range may be smaller, and check the squares: a norm turns rows whose squares
    # overflow into zeros.
    finite = new.to(rows).float().square().sum(1).isfinite()
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        if not rows[row].isfinite().all():
            raise UserError(
                f"intervention at {site}: the model's activation contains NaN or Inf at {where(row)}, before the edit"
            )
        raise UserError(
            f"intervention at {site}: the edit returned NaN, Inf or numbers too large for the model "
            f"({str(rows.dtype).removeprefix('torch.')}) at {where(row)}"
        )
