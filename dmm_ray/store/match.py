"""Who fits whom: a store and what a prior models, and rows that can be used at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from dmm_ray.errors import UserError
from dmm_ray.store.reader import ActivationStore, Rows

logger = logging.getLogger(__name__)
CHECKED_BYTES = 1 << 20
"""Rows looked at together: few enough for the cache."""
EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float32: (torch.int32, 0x7F800000)}
"""By stored dtype: the integers its bits are read as, and the exponent's bits, all set in inf and NaN alone."""


def check_fits(
    store: ActivationStore,
    d: int,
    layers: Sequence[int],
    subject: Mapping[str, Any],
    other_model: Literal["refuse", "warn"] = "refuse",
) -> tuple[int, ...]:
    """Check a store against a prior; those of the prior's ``layers`` that the store has.

    Another width is refused, and a store with none of the layers. A store of another language model (other weights or
    code) is refused where percentiles or losses would mean something else; where a prior is only applied to rows it is
    a warning: to score a fine-tuned model by its base model's prior is a question worth asking. A prior that does not
    say what it was trained on fits every model.

    Args:
        store: rows.
        d: width that the prior models.
        layers: blocks that it models, those that are wanted.
        subject: what it says of its language model: ``id``, ``weights_hash``.
        other_model: what to do about another one.

    Raises:
        UserError: it does not fit.
    """
    if store.d != d:
        raise UserError(f"activations: {store.uri} has d = {store.d}, the prior models d = {d}")
    shared = tuple(layer for layer in layers if layer in store.layers)
    if not shared:
        wanted, there = (", ".join(map(str, numbers)) for numbers in (layers, store.layers))
        raise UserError(
            f"layer: the prior models layer {wanted}, {store.uri} has {there}; extract that layer"
        )
    ours, theirs = subject.get("weights_hash"), store.manifest.subject
    code, their_code = (subject.get("resolved") or {}).get("code"), theirs.resolved and theirs.resolved.code
    other_code = code is not None and their_code is not None and code != their_code
    if ours and (ours != theirs.weights_hash or other_code):
        how = (
            "other Python code"
            if ours == theirs.weights_hash
            else f"{theirs.weights_hash[:12]}, not {ours[:12]}"
        )
        message = (
            f"activations: {store.uri} is of the model {theirs.id}, the prior was trained on {subject.get('id')} "
            f"({how})"
        )
        if other_model == "refuse":
            raise UserError(f"{message}; give a store of that model")
        logger.warning("%s", message)
    return shared


def check_finite(store: ActivationStore, layer: int, rows: Rows) -> None:
    """Raises UserError naming the document and position of the first row with a value that is not finite."""
    integer, exponent = EXPONENTS[rows.activation.dtype]
    bits = rows.activation.view(integer).numpy()
    step = max(1, CHECKED_BYTES // store.manifest.bytes_per_row)
    for low in range(0, len(bits), step):
        found = bits[low : low + step] & exponent
        if found.max() == exponent:
            bad = low + int((found == exponent).any(1).argmax())
            raise UserError(
                f"{store.uri}: layer {layer} holds a value that is not finite at document {rows.doc[bad]}, "
                f"position {rows.position[bad]}; extract that document again"
            )
