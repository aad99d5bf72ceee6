"""Parses a record of a corpus: a text, a chat, or an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Role of each speaker in conversations with ``from`` and ``value`` (ShareGPT)."""
OF_TOOLS = ("tool_calls", "tool_call_id", "name")
MESSAGES = "messages"
"""The field with a chat, read if a record has no text field."""


class Document(NamedTuple):
    """One document of a corpus: exactly one of ``text``, ``error`` and ``messages`` is not None."""

    doc: int
    text: str | None
    error: str | None
    messages: tuple[dict[str, Any], ...] | None = None
    """A chat: at least one message with ``role`` and ``content``, plus any tool fields."""

    @property
    def content(self) -> str | tuple[dict[str, Any], ...]:
        """The text or messages; empty for a failed document."""
        return self.text or self.messages or ""


class Content(NamedTuple):
    """A document without a number yet: exactly one field is not None."""

    text: str | None = None
    error: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None

    @property
    def is_blank(self) -> bool:
        """Whether this is a text that contains only white space."""
        return self.text is not None and not self.text.strip()


def plain_content(raw: bytes) -> Content:
    """Decode ``raw`` and strip surrounding white space."""
    try:
        return Content(text=raw.decode().removeprefix("\ufeff").strip())
    except UnicodeDecodeError:
        return Content(error="not valid UTF-8")


def json_content(raw: bytes, text_field: str) -> Content:
    """Parse a line of JSONL. A blank line is a blank document."""
    content = plain_content(raw)
    if not content.text:
        return content
    try:
        record = json.loads(content.text)
    except (ValueError, RecursionError):
        return Content(error="not valid JSON")
    return record_content(record if isinstance(record, dict) else {}, text_field)


def record_content(record: Mapping[str, object], text_field: str) -> Content:
    """Parse a record that has the text field or, failing that, ``messages``."""
    if text_field in record:
        value = record[text_field]
        return (
            _chat_content(value, text_field) if isinstance(value, list) else _text_content(value, text_field)
        )
    if MESSAGES in record:
        return _chat_content(record[MESSAGES], MESSAGES)
    return Content(error=f"no field {text_field!r}; name the one that holds the text with --text-field")


def _text_content(value: object, text_field: str) -> Content:
    problem = _problem(value, f"field {text_field!r}")
    return Content(error=problem) if problem else Content(text=str(value))


def _chat_content(value: object, field: str) -> Content:
    """Parse a list of messages into the form that chat templates expect: ``{"role": str, "content": str}``.

    The content may be a list of text parts, or null if there are tool calls. ``from`` and ``value``, with ShareGPT's
    speaker names, are read as role and content. Other keys are dropped, except those for tools.
    """
    if not isinstance(value, list) or not value:
        kind = "null" if value is None else "an empty list" if value == [] else "not a list"
        return Content(error=f"field {field!r} is {kind}")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(value, 1):
        found = _message(message, number)
        if isinstance(found, str):
            return Content(error=found)
        messages.append(found)
    return Content(messages=tuple(messages))


def _message(message: object, number: int) -> dict[str, Any] | str:
    """The parsed message, or an error message."""
    if not isinstance(message, dict):
        return f"message {number} is not an object with role and content"
    if "from" in message and "value" in message and "role" not in message:
        speaker = message["from"]
        if speaker not in SHAREGPT:
            return f"message {number} is from {str(speaker)[:40]!r}; expected one of {', '.join(SHAREGPT)}"
        message = {"role": SHAREGPT[speaker], "content": message["value"]}
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            return f"message {number} has no {key!r}"
    found = {"role": message["role"], "content": _joined(message.get("content"))}
    with_tools = bool(message.get("tool_calls")) or message["role"] == "tool"
    if with_tools:
        found["content"] = "" if found["content"] is None else found["content"]
        found |= {key: message[key] for key in OF_TOOLS if message.get(key) is not None}
    for key in ("role", "content"):
        if problem := _problem(found[key], f"{key!r} of message {number}"):
            return problem
    return found


def _joined(content: object) -> object:
    """The joined text of a list of text parts; anything else unchanged."""
    if not isinstance(content, list):
        return content
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


def _problem(value: object, what: str) -> str | None:
    """Why ``value`` is not valid text; None if it is."""
    if not isinstance(value, str):
        if value is None:
            return f"{what} is null"
        parts = (
            {str(part.get("type")) for part in value if isinstance(part, dict)}
            if isinstance(value, list)
            else ()
        )
        if kinds := sorted(set(parts) - {"text"}):
            return f"{what} has a part of type {kinds[0][:40]!r}; only text parts are supported"
        return f"{what} is not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{what} contains an unpaired surrogate"
    return None
