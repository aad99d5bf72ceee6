"""A text as a language model sees it: its tokens, where they stand, and a layer's activation at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dmm_ray.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a part of a character."""


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


def pieces_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[Piece]:
    """The tokens ``ids`` of ``text`` with their characters. Raises UserError for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        raise UserError("model: its tokenizer gives no character offsets; use another")
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    spans = spans[len(spans) - len(ids) :]  # a text that begins with the special token itself has it once
    pieces = [Piece(token, text[a:b], a, b) for token, (a, b) in zip(ids, spans, strict=True)]
    return [one if one.text else one._replace(text=token_text(tokenizer, one.id)) for one in pieces]


def token_text(tokenizer: Any, token: int) -> str:
    """A token's characters; its name in the vocabulary where it is part of a character, or special."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return tokenizer.convert_ids_to_tokens(token) if not text or REPLACEMENT in text else text
