"""What a record of a corpus says: a text, a chat, or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

MESSAGES = "messages"
"""The field of a chat, read where a record has no text field."""


class Document(NamedTuple):
    """One document of a corpus: exactly one of ``text``, ``error`` and ``messages`` is not None."""

    doc: int
    text: str | None
    error: str | None
    messages: tuple[dict[str, str], ...] | None = None
    """A chat: at least one message of a ``role`` and a ``content``."""

    @property
    def content(self) -> str | tuple[dict[str, str], ...]:
        """Its text or its messages; empty for a failed one."""
        return self.text or self.messages or ""


class Content(NamedTuple):
    """A document that is not numbered yet: exactly one field is not None."""

    text: str | None = None
    error: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def is_blank(self) -> bool:
        """Whether it is a text of white space alone."""
        return self.text is not None and not self.text.strip()


def plain_content(raw: bytes) -> Content:
    """The text that ``raw`` encodes, without the white space around it."""
    try:
        return Content(text=raw.decode().removeprefix("\ufeff").strip())
    except UnicodeDecodeError:
        return Content(error="not valid UTF-8")


def json_content(raw: bytes, text_field: str) -> Content:
    """A line of jsonl. A blank line is a blank document."""
    content = plain_content(raw)
    if not content.text:
        return content
    try:
        record = json.loads(content.text)
    except (ValueError, RecursionError):
        return Content(error="not valid JSON")
    return record_content(record if isinstance(record, dict) else {}, text_field)


def record_content(record: Mapping[str, object], text_field: str) -> Content:
    """A record with the text field, or else with ``messages``."""
    if text_field in record:
        return _text_content(record[text_field], text_field)
    if MESSAGES in record:
        return _chat_content(record[MESSAGES])
    return Content(error=f"no field {text_field!r}; name the one that holds the text with --text-field")


def _text_content(value: object, text_field: str) -> Content:
    problem = _problem(value, f"field {text_field!r}")
    return Content(error=problem) if problem else Content(text=str(value))


def _chat_content(value: object) -> Content:
    """``[{"role": str, "content": str}, ...]``; other keys of a message are left out."""
    if not isinstance(value, list) or not value:
        kind = "null" if value is None else "an empty list" if value == [] else "not a list"
        return Content(error=f"field {MESSAGES!r} is {kind}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return Content(error=f"message {number} is not an object with role and content")
        for key in ("role", "content"):
            if key not in message:
                return Content(error=f"message {number} has no {key!r}")
            if problem := _problem(message[key], f"{key!r} of message {number}"):
                return Content(error=problem)
    return Content(messages=tuple({key: message[key] for key in ("role", "content")} for message in value))


def _problem(value: object, what: str) -> str | None:
    """Why ``value`` is no text, if it is none."""
    if not isinstance(value, str):
        return f"{what} is null" if value is None else f"{what} is not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{what} holds half a surrogate pair"
    return None
