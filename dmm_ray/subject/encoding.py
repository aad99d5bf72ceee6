"""Tokenisation of documents: the single implementation used by extraction, checks and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from dmm_ray.errors import UserError
from dmm_ray.subject.quiet import first_line, quiet

EXAMPLES = 1000
"""Maximum number of vocabulary tokens to try as example texts."""
TODAY = datetime(2024, 7, 26)
"""The date given to chat templates that ask for today's (Llama's put it in the system message): a row must not depend
on when it was computed. This is the default date in Llama 3.1's template."""
DATE_CODES = ("%-d", "%-m", "%-H", "%-I", *(f"%{letter}" for letter in "aAbBcdDeFGhHIjmMnpSTuUVwWxXyY"))
Chat = Sequence[Mapping[str, str]]
"""Messages, each {"role": ..., "content": ...}."""


class ChatRefusedError(ValueError):
    """The tokenizer's chat template does not accept these messages."""


class Encoded(NamedTuple):
    """The tokens of one document."""

    ids: list[int]
    length: int
    """Number of tokens in the whole document, before truncation."""
    suffix: int
    """Number of special tokens that the tokenizer put at the end of ``ids``: 1 for BERT's [SEP], 0 for Llama."""


def encode(tokenizer: Any, documents: Sequence[str | Chat], window: int | None) -> list[Encoded]:
    """Token ids of each document, at most ``window`` of them, not padded.

    A text gets the tokenizer's own special tokens. If it already begins with the text of the opening one, as a rendered
    chat does, that token is not repeated. Messages go through the tokenizer's chat template, which writes all special
    tokens itself. A truncated text keeps its closing special tokens. Blank documents have no tokens.

    Args:
        tokenizer: a transformers tokenizer.
        documents: texts, or lists of messages.
        window: maximum tokens per document; None for no limit.

    Raises:
        UserError: there are messages, but the tokenizer has no chat template.
        ChatRefusedError: the chat template rejects some messages.
    """
    chats = [i for i, document in enumerate(documents) if not isinstance(document, str) and document]
    texts = [i for i, document in enumerate(documents) if isinstance(document, str) and document.strip()]
    before, after = _special_tokens(tokenizer) if texts else ([], [])
    encoded = [Encoded([], 0, 0)] * len(documents)
    for i, ids in zip(texts, _tokenize(tokenizer, [documents[i] for i in texts], True), strict=True):
        encoded[i] = _cut(_once(tokenizer, documents[i], ids, before), len(after), window)
    rendered = [render_chat(tokenizer, documents[i]) for i in chats]
    for i, ids in zip(chats, _tokenize(tokenizer, rendered, False), strict=True):
        encoded[i] = _cut(ids, 0, window)
    return encoded


def _tokenize(tokenizer: Any, texts: Sequence[Any], special: bool) -> list[list[int]]:
    if not texts:
        return []
    with quiet():
        return tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
        )["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that ``tokenizer`` puts before and after a text.

    Found by encoding a text with no special tokens of its own. ``a`` would do for most tokenizers, but a vocabulary
    without Latin letters encodes it as nothing or as the unknown token.

    Raises:
        UserError: no text tried from the vocabulary reveals them.
    """
    [around] = _tokenize(tokenizer, [""], True)
    if not around:
        return [], []
    special = {*around, *tokenizer.all_special_ids}
    for text in _examples(tokenizer):
        [content], [whole] = _tokenize(tokenizer, [text], False), _tokenize(tokenizer, [text], True)
        if not content or special.intersection(content):
            continue
        for start in range(len(whole) - len(content) + 1):
            if whole[start : start + len(content)] == content:
                return whole[:start], whole[start + len(content) :]
    raise UserError(
        f"model: the tokenizer of {tokenizer.name_or_path} produces only special tokens for every text tried; "
        "check that its vocabulary belongs to this model"
    )


def _examples(tokenizer: Any) -> Iterator[str]:
    """Texts to try a tokenizer with: a letter, then single tokens of its vocabulary, decoded."""
    yield "a"
    for token in range(min(len(tokenizer), EXAMPLES)):
        text = tokenizer.decode([token])
        if text.strip():
            yield text


def _once(tokenizer: Any, text: Any, ids: list[int], before: list[int]) -> list[int]:
    """``ids`` without the duplicate of the opening special token if ``text`` itself begins with it."""
    n = len(before)
    twice = n > 0 and ids[n - 1 : n + 1] == [before[-1]] * 2
    if twice and text.startswith(tokenizer.convert_ids_to_tokens(before[-1])):
        return ids[:n] + ids[n + 1 :]
    return ids


def _cut(ids: list[int], suffix: int, window: int | None) -> Encoded:
    if window is None or len(ids) <= window:
        return Encoded(ids, len(ids), suffix)
    content = ids[: max(window - suffix, 0)]
    return Encoded(content + ids[len(ids) - suffix :], len(ids), suffix)


def render_chat(tokenizer: Any, messages: Any, *, reply: bool = False) -> str:
    """``messages`` as the text that the model was trained on, special tokens included.

    Args:
        tokenizer: a transformers tokenizer.
        messages: each {"role": ..., "content": ...}.
        reply: end with the generation prompt, so that the model answers.

    Raises:
        UserError: the tokenizer has no chat template.
        ChatRefusedError: the chat template rejects the messages.
    """
    from jinja2 import TemplateError  # imported here: only chats need it

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"model: the tokenizer of {name} has no chat template, which documents with messages require; "
            "give documents with text, or a chat model"
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _fixed_date() + template
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=reply,
        )
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise ChatRefusedError(f"the chat template of {name} rejects these messages ({first_line(e)})") from e


@cache
def _fixed_date() -> str:
    """A Jinja macro that shadows transformers' function of the same name and formats TODAY."""
    codes = "".join(f"|replace('{code}', '{TODAY.strftime(code)}')" for code in DATE_CODES)
    # The empty expression preserves the template's first line: Jinja drops a newline right after a block.
    return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}{{{{ '' }}}}"
