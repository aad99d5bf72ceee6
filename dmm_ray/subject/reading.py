"""Texts and prompts as a language model sees them: tokens, their character offsets, and a layer's activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from dmm_ray.arguments import as_integer
from dmm_ray.errors import UserError
from dmm_ray.subject.encoding import Chat, ChatRefusedError, encode, render_chat

Prompt = str | Chat | Sequence[int]
"""A text, a chat's messages, or token ids to be continued."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that decoding produces for an incomplete character."""


class TooLongError(UserError):
    """A text has more tokens than the model's context."""


class TokenPiece(NamedTuple):
    """A token and its place in the text."""

    id: int
    text: str
    """Its characters, or its name for a special token."""
    start: int
    """Offset of its first character in Unicode code points; equal to ``end`` for a special token."""
    end: int
    """Offset of the character after its last one."""


class Reading(NamedTuple):
    """The tokens of a text and a layer's activations."""

    pieces: list[TokenPiece]
    rows: Tensor
    """The layer's output at every position (t, d), float32, on the CPU."""


def text_ids(tokenizer: Any, text: str, context: int) -> list[int]:
    """Token ids of ``text``, special ones included, not truncated.

    Raises:
        UserError: the text has no tokens.
        TooLongError: the text has more tokens than ``context``.
    """
    [encoded] = encode(tokenizer, [text], context + 1)
    if not encoded.ids:
        raise UserError("text: it contains no tokens; send some words")
    if len(encoded.ids) > context:
        raise TooLongError(f"text: more tokens than the model's context of {context}; send it in parts")
    return encoded.ids


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt], context: int, vocabulary: int) -> list[list[int]]:
    """Token ids of each prompt; a chat ends where the model's answer begins.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: texts, chats or token ids.
        context: maximum tokens of a prompt and its continuation.
        vocabulary: size of the vocabulary.

    Raises:
        UserError: a prompt has no tokens or token ids outside the vocabulary, or the template rejects a chat.
        TooLongError: a prompt leaves no room for a new token.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
        raise UserError("prompts: expected a list of prompts; put a single one into a list of its own")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(
        encode(tokenizer, texts, context)
    )  # all at once: the overhead of a call exceeds the time for one text
    found: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if isinstance(prompt, str):
            ids = next(encoded).ids
        elif len(prompt) and all(isinstance(message, Mapping) for message in prompt):
            ids = _chat_ids(tokenizer, cast(Chat, prompt), name)
        else:
            ids = [as_integer(name, token) for token in prompt]
        if not ids:
            raise UserError(f"{name}: it contains no tokens; send some words")
        if bad := [token for token in ids if not 0 <= token < vocabulary]:
            raise UserError(f"{name}: the vocabulary has tokens 0 to {vocabulary - 1} (got {bad[0]})")
        if len(ids) >= context:
            raise TooLongError(f"{name}: fills the model's context of {context} tokens; shorten it")
        found.append(ids)
    return found


def _chat_ids(tokenizer: Any, chat: Chat, name: str) -> list[int]:
    try:
        text = render_chat(tokenizer, chat, reply=True)
    except ChatRefusedError as e:
        raise UserError(f"{name}: {e}") from e
    # The template has written all special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pieces_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[TokenPiece]:
    """The tokens ``ids`` of ``text`` with their characters. Raises UserError if the tokenizer has no offsets."""
    if not tokenizer.is_fast:
        raise UserError("model: its tokenizer has no character offsets; use a model with a fast tokenizer")
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    spans = spans[
        len(spans) - len(ids) :
    ]  # encode() drops the opening token if the text itself begins with it
    pieces = [TokenPiece(token, text[a:b], a, b) for token, (a, b) in zip(ids, spans, strict=True)]
    return [one if one.text else one._replace(text=token_text(tokenizer, one.id)) for one in pieces]


def token_text(tokenizer: Any, token: int) -> str:
    """A token's characters, or its name in the vocabulary if it is part of a character, or special."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return tokenizer.convert_ids_to_tokens(token) if not text or REPLACEMENT in text else text
