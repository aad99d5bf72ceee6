"""Compressed files, csv, messages, damaged files, what a folder gives."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmm_ray.errors import UserError
from dmm_ray.files import sha256
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document
from dmm_ray.text.formats.csv_rows import CsvRows
from dmm_ray.text.formats.streams import READ_BYTES

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return file


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(*uris: str, text_field: str = "text") -> list[Document]:
    corpus = Corpus.scan(uris, text_field=text_field)
    found = list(corpus.read())
    assert [d.doc for d in found] == list(range(corpus.n_documents))
    assert corpus.problems == [d for d in found if d.error]
    for d in found:
        assert sum(value is not None for value in (d.text, d.error, d.messages)) == 1
    return found


def texts(*uris: str, text_field: str = "text") -> list[str | None]:
    return [d.text for d in read(*uris, text_field=text_field)]


PACK = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACK)
def test_all_members_of_a_compressed_file_are_read(write: Write, suffix: str) -> None:
    expected = [f"{i} " + "word " * (i % 50) for i in range(9000)]
    content = lines(expected)
    cuts = [0, 10, 10, 65536, READ_BYTES + 3, len(content)]  # one member is empty, others end inside a line
    members = [PACK[suffix](content[a:b]) for a, b in pairwise(cuts)]
    uri = write("a.jsonl" + suffix, b"".join(members))
    corpus = Corpus.scan([uri])
    assert [d.text for d in corpus.read()] == expected
    assert corpus.files[0].sha256 == sha256(uri)
    assert [d.text for d in corpus.read(8000, 8003)] == expected[8000:8003]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_txt_and_csv(write: Write, suffix: str) -> None:
    pack = PACK[suffix]
    assert texts(write("a.txt" + suffix, pack(b"one\n\ntwo\n"))) == ["one", "two"]
    assert texts(write("b.txt" + suffix, pack(b"one\n\nstill<|endoftext|>two"))) == ["one\n\nstill", "two"]
    assert texts(write("c.csv" + suffix, pack(b'text\n"a\nb"\n'))) == ["a\nb"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_damaged_compressed_file_is_named(write: Write, name: str, suffix: str) -> None:
    packed = PACK[suffix](b"text\n" + b"some words and more\n" * 5000)
    for damaged in (packed[:-1], packed[: len(packed) // 2], packed[:5], b"not compressed", packed + b"tail"):
        uri = write(name + suffix, damaged)
        with pytest.raises(
            UserError, match=f"text: {uri}: damaged, truncated or not in the format of its suffix"
        ):
            Corpus.scan([uri])


def test_a_mark_after_many_paragraphs_changes_the_rule(write: Write) -> None:
    paragraphs = b"a paragraph\n\n" * 30_000
    found = read(write("a.txt", paragraphs + b"<|endoftext|>last"))
    assert len(found) == 2
    assert found[1].text == "last"


def test_one_long_document(write: Write) -> None:
    long = "word " * 400_000
    for uri in (write("a.jsonl", lines(["x", long, "y"])), write("b.csv", f"text\nx\n{long}\ny\n".encode())):
        assert texts(uri) == ["x", long, "y"]


def test_csv_rows(write: Write) -> None:
    content = (
        b"\xef\xbb\xbfid,text\r\n"
        b'1,"two\r\nlines, ""quoted"""\r\n'
        b"2,\xff bad\r\n"
        b"\r\n"
        b"3,unquoted, comma\r\n"
        b"4\r\n"
        b"5,\r\n"
        b"\xff,end"
    )
    found = read(write("a.csv", content))
    assert [d.text for d in found] == ['two\r\nlines, "quoted"', None, None, None, "", "end"]
    assert found[1].error.endswith("a.csv: row 2: not valid UTF-8")
    assert "row 3: has 3 fields, but the header has 2" in found[2].error
    assert "row 4: has 1 fields" in found[3].error


def test_csv_without_the_field(write: Write) -> None:
    uri = write("a.csv", b"id,body\n1,x\n")
    assert "row 1: no field 'text'; name the one" in read(uri)[0].error
    assert texts(uri, text_field="body") == ["x"]


def test_csv_with_an_open_quote(write: Write) -> None:
    uri = write("a.csv", b'text\nx\n"never closed\ny\n')
    with pytest.raises(UserError, match=r"a.csv: damaged.*row 2: a quote is never closed"):
        Corpus.scan([uri])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet='a",\n\ré', max_size=9), min_size=1, max_size=90))
def test_csv_written_by_python_reads_back(values: list[str]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], *([str(i), value] for i, value in enumerate(values))])
    blocks = CsvRows("text", None).blocks(io.BytesIO(out.getvalue().encode()))
    assert [block.parse(raw).text for block in blocks for raw in block.raws] == values


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]


def test_messages_of_jsonl(write: Write) -> None:
    records = [
        {"messages": [*CHAT, {"role": "user", "content": "x", "weight": 1}]},
        {"text": "wins", "messages": CHAT},
        {"text": None, "messages": CHAT},
        {"messages": []},
        {"messages": None},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [*CHAT, {"role": "user"}]},
        {"messages": [{"role": None, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"number": 0},
    ]
    found = read(write("a.jsonl", "\n".join(map(json.dumps, records)).encode()))
    assert found[0] == Document(0, None, None, (*CHAT, {"role": "user", "content": "x"}))
    assert found[1] == Document(1, "wins", None)
    reasons = [(d.error or "").partition(f"line {d.doc + 1}: ")[2] for d in found[2:]]
    assert reasons == [
        "field 'text' is null",
        "field 'messages' is an empty list",
        "field 'messages' is null",
        "field 'messages' is not a list",
        "message 1 is not an object with role and content",
        "message 3 has no 'content'",
        "'role' of message 1 is null",
        "'content' of message 1 is not a string",
        "'content' of message 1 contains an unpaired surrogate",
        "no field 'text'; name the one that holds the text with --text-field",
    ]


def test_a_number_of_too_many_digits_spoils_its_line_alone(write: Write) -> None:
    found = read(write("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b'}\n{"text": "y"}'))
    assert [d.text for d in found] == [None, "y"]


def test_a_folder_gives_every_known_kind_in_order(write: Write, tmp_path: Path) -> None:
    write("f/b.csv", b"text\nb\n")
    write("f/0.json.gz", gzip.compress(lines(["0"])))  # JSON lines, as some hub datasets have them
    write("f/a.jsonl.gz", gzip.compress(lines(["a"])))
    write("f/deep/c.txt.zst", zstd(b"c"))
    write("f/notes.md", b"x")
    write("f/other.json", b"{}")
    assert texts(str(tmp_path / "f")) == ["0", "a", "b", "c"]
    assert texts(str(tmp_path / "f" / "*.csv"), str(tmp_path / "f" / "deep")) == ["b", "c"]
    with pytest.raises(
        UserError, match=r"other.json: unknown file type; supported suffixes are .*\.txt\.zst.*\.arrow"
    ):
        Corpus.scan([str(tmp_path / "f" / "other.json")])


def test_other_filesystems() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/sources/a.jsonl", lines([f"a{i}" for i in range(100)]))
    fs.pipe("/sources/b.txt.gz", gzip.compress(b"b"))
    fs.pipe("/sources/c.csv", b"text\nc\n")
    try:
        corpus = Corpus.scan(["memory://sources"])
        assert [d.text for d in corpus.read()] == [*(f"a{i}" for i in range(100)), "b", "c"]
        together = list(zip(corpus.read(0, 90), corpus.read(1, 91), strict=True))
        assert all(int(b.text[1:]) - int(a.text[1:]) == 1 for a, b in together)
        fs.rm("/sources/b.txt.gz")
        with pytest.raises(UserError, match=r"b.txt.gz: the file no longer exists"):
            list(corpus.read(100))
    finally:
        fs.rm("/sources", recursive=True)


def test_a_compressed_file_that_changed_is_noticed(write: Write) -> None:
    corpus = Corpus.scan([write("a.jsonl.gz", gzip.compress(lines(["x"] * 9)))])
    write("a.jsonl.gz", gzip.compress(lines(["x"] * 5000)))
    with pytest.raises(UserError, match="changed since"):
        list(corpus.read())
