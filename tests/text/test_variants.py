"""Variants of the formats: read right, or named in one line; a truly damaged file is still called damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dmm_ray.errors import UserError
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document


def documents(path: Path, **options: Any) -> list[Document]:
    return list(Corpus.scan([str(path)], **options).read())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        documents(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arrow_streams_and_files(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two", "three"]})
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert [one.text for one in documents(path)] == ["one", "two", "three"]
        path.write_bytes(path.read_bytes()[:-9])
        assert "damaged" in refusal(path)


def test_a_long_zstd_window_is_named(tmp_path: Path) -> None:
    """A frame of one raw block that asks for a window of 2^28 bytes (RFC 8878, section 3.1.1)."""
    text = b'{"text": "a"}\n'
    frame = (
        b"\x28\xb5\x2f\xfd" + bytes([0, (28 - 10) << 3]) + ((len(text) << 3) | 1).to_bytes(3, "little") + text
    )
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(frame)
    assert (
        "compressed with a long zstd window (--long), which is unsupported; recompress it without"
        in refusal(path)
    )
    path.write_bytes(frame[:4] + bytes([0, (20 - 10) << 3]) + frame[6:])
    assert [one.text for one in documents(path)] == ["a"]
    path.write_bytes(frame[:4] + bytes([0, (20 - 10) << 3]) + frame[6:-3])
    assert "damaged" in refusal(path)


def test_csv_that_would_be_read_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"fine ""quoted""",1\n"he said \\"hi\\" ok",1\n')
    assert "row 2: a quote inside a quoted field must be doubled" in refusal(path)
    path.write_text("text,text\na,b\n")
    assert "its header has 'text' more than once" in refusal(path)
    path.write_text("n,n,text\n1,2,b\n")
    assert [one.text for one in documents(path)] == ["b"]
    path.write_text('text\n5" wide\n"never closed\n')
    assert "a quote is never closed" in refusal(path)


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([USER], (USER,)),
        ([USER | {"id": 7}], (USER,)),
        (
            [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
            (USER,),
        ),
        ([{"from": "human", "value": "hi"}], (USER,)),
        ([{"from": "gpt", "value": "yo"}], ({"role": "assistant", "content": "yo"},)),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "name": "f"},
            ],
            (
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "name": "f"},
            ),
        ),
    ],
)
@pytest.mark.parametrize("field", ["messages", "conversation"])
def test_chats_in_any_column(tmp_path: Path, field: str, given: list[Any], found: tuple[Any, ...]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({field: given}) + "\n")
    [one] = documents(path, text_field="text" if field == "messages" else field)
    assert (one.messages, one.error) == (found, None)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([{"from": "bing", "value": "hi"}], "message 1 is from 'bing'"),
        ([USER, {"role": "assistant", "content": None}], "'content' of message 2 is null"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "a part of type 'image_url'",
        ),
        ([{"role": "assistant", "tool_calls": []}], "message 1 has no 'content'"),
        ([], "is an empty list"),
    ],
)
def test_what_is_no_chat_says_why(tmp_path: Path, given: list[Any], error: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": given}) + "\n" + json.dumps({"messages": [USER]}) + "\n")
    first, second = documents(path)
    assert first.error is not None
    assert error in first.error
    assert second.messages == (USER,)
