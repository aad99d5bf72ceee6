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


class TokenPiece(NamedTuple):
    """A token and where it stands in its text."""

    id: int
    text: str
    """Its characters; for a special token, its name."""
    start: int
    """First character (Unicode code points), and the one after the last; equal for a special token."""
    end: int


class Reading(NamedTuple):
    """A text as a layer sees it."""

    pieces: list[TokenPiece]
    rows: Tensor
    """The layer's output at every position (t, d), float32, on the CPU."""


def text_ids(tokenizer: Any, text: str, context: int) -> list[int]:
    """Token ids of ``text``, special ones included, not cut.

    Raises:
        UserError: a text without tokens.
        TooLongError: more tokens than ``context``.
    """
    [encoded] = encode(tokenizer, [text], context + 1)
    if not encoded.ids:
        raise UserError("text: it holds no tokens; send some words")
    if len(encoded.ids) > context:
        raise TooLongError(f"text: more tokens than the model's context of {context}; send it in parts")
    return encoded.ids


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt], context: int, vocabulary: int) -> list[list[int]]:
    """Token ids of what is to be continued; a chat ends where the model's answer begins.

    Args:
        tokenizer: of transformers.
        prompts: texts, chats or token ids.
        context: the most tokens of a prompt and its continuation.
        vocabulary: how many tokens there are.

    Raises:
        UserError: a prompt without tokens, token ids outside of the vocabulary, a chat that the template refuses.
        TooLongError: one that leaves no room for a token.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
        raise UserError("prompts: expected a list of prompts; put a single one into a list of its own")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(
        encode(tokenizer, texts, context)
    )  # all at once: for each it would take longer than the text
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
            raise UserError(f"{name}: it holds no tokens; send some words")
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
    """The tokens ``ids`` of ``text`` with their characters. Raises UserError for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        raise UserError("model: its tokenizer gives no character offsets; use another")
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    spans = spans[len(spans) - len(ids) :]  # a text that begins with the special token itself has it once
    pieces = [TokenPiece(token, text[a:b], a, b) for token, (a, b) in zip(ids, spans, strict=True)]
    return [one if one.text else one._replace(text=token_text(tokenizer, one.id)) for one in pieces]


def token_text(tokenizer: Any, token: int) -> str:
    """A token's characters; its name in the vocabulary where it is part of a character, or special."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return tokenizer.convert_ids_to_tokens(token) if not text or REPLACEMENT in text else text
