"""Texts and prompts as a language model sees them: their tokens, where they stand, a layer's activation at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from dmm_ray.arguments import as_integer
from dmm_ray.errors import UserError
from dmm_ray.subject.encoding import Chat, ChatRefusedError, encode, render_chat

Prompt = str | Chat | Sequence[int]
"""What is to be continued: a text, a chat's messages, or token ids."""

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


def text_ids(tokenizer: Any, text: str, context: int, field: str = "text") -> list[int]:
    """Token ids of ``text``, special ones included, not cut.

    Args:
        tokenizer: of transformers.
        text: not blank.
        context: most tokens.
        field: what errors call it.

    Raises:
        UserError: a text without tokens.
        TooLongError: more tokens than ``context``.
    """
    [encoded] = encode(tokenizer, [text], context + 1)
    if not encoded.ids:
        raise UserError(f"{field}: it holds no tokens; send some words")
    if len(encoded.ids) > context:
        raise TooLongError(f"{field}: more tokens than the model's context of {context}; send it in parts")
    return encoded.ids


def prompt_ids(tokenizer: Any, prompt: Prompt, context: int, vocabulary: int) -> list[int]:
    """Token ids of what is to be continued; a chat ends where the model's answer begins.

    Args:
        tokenizer: of transformers.
        prompt: a text, a chat or token ids.
        context: the most tokens of the prompt and its continuation.
        vocabulary: how many tokens there are.

    Raises:
        UserError: a prompt without tokens, token ids outside of the vocabulary, a chat that the template refuses.
        TooLongError: it leaves no room for a token.
    """
    if isinstance(prompt, str):
        ids = text_ids(tokenizer, prompt, context, "prompt")
    elif all(isinstance(message, Mapping) for message in prompt) and len(prompt):
        ids = _chat_ids(tokenizer, cast(Chat, prompt))
    else:
        ids = [as_integer("prompt", token) for token in prompt]
    if not ids:
        raise UserError("prompt: it holds no tokens; send some words")
    if bad := [token for token in ids if not 0 <= token < vocabulary]:
        raise UserError(f"prompt: the vocabulary has tokens 0 to {vocabulary - 1} (got {bad[0]})")
    if len(ids) >= context:
        raise TooLongError(f"prompt: fills the model's context of {context} tokens; shorten it")
    return ids


def _chat_ids(tokenizer: Any, chat: Chat) -> list[int]:
    try:
        text = render_chat(tokenizer, chat, reply=True)
    except ChatRefusedError as e:
        raise UserError(f"prompt: {e}") from e
    # The template has written all special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
