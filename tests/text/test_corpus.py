from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmm_ray.errors import UserError
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.formats import base, delimited
from dmm_ray.text.formats.splitting import LINES, MARKED, PARAGRAPHS, Format, Splitter, separated_by


def texts(corpus: Corpus) -> list[str | None]:
    return [document.text for document in corpus.read()]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_jsonl_counts_every_line(tmp_path: Path) -> None:
    lines = [
        '{"text": "one"}',
        "",
        '{"text": "  "}',
        "not json",
        '{"body": "x"}',
        '{"text": 3}',
        "[1]",
        '{"text": "end"}',
    ]
    corpus = Corpus.scan([write(tmp_path / "a.jsonl", "\n".join(lines))])
    found = list(corpus.read())
    assert [d.doc for d in found] == list(range(8))
    assert [d.text for d in found] == ["one", "", "  ", None, None, None, None, "end"]
    assert found[3].error.endswith("a.jsonl: line 4: not valid JSON")
    assert "line 5: no field 'text'; name the one" in found[4].error
    assert "line 6: field 'text' is not a string" in found[5].error
    assert corpus.problems == [d for d in found if d.error]


def test_jsonl_field_newline_at_end_bom_and_crlf(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"body": "one"}\r\n{"body": "two"}\r\n'
    assert texts(Corpus.scan([write(tmp_path / "a.jsonl", content)], text_field="body")) == ["one", "two"]


def test_invalid_bytes_and_surrogates(tmp_path: Path) -> None:
    content = b'{"text": "ok"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n'
    errors = [d.error for d in Corpus.scan([write(tmp_path / "a.jsonl", content)]).read()]
    assert errors[0] is None
    assert "line 2: not valid UTF-8" in errors[1]
    assert "line 3: field 'text' contains an unpaired surrogate" in errors[2]


def test_txt_markers_win_over_blank_lines(tmp_path: Path) -> None:
    marked = write(tmp_path / "a.txt", "one\n\nstill one\n<|endoftext|>\n\n<|endoftext|>three<|endoftext|>\n")
    assert texts(Corpus.scan([marked])) == ["one\n\nstill one", "", "three"]
    plain = write(tmp_path / "b.txt", "\n\n one\nline two\n\n \n\t\ntwo\r\n\r\nthree\n\n")
    assert texts(Corpus.scan([plain])) == ["one\nline two", "two", "three"]
    assert texts(Corpus.scan([plain], separator="two")) == ["one\nline", "", "three"]


def test_files_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "readme.md"):
        write(tmp_path / name, f'{{"text": "{name}"}}\n' if name.endswith("l") else name)
    expected = ["a.jsonl", "b.jsonl", "c.txt"]
    assert texts(Corpus.scan([str(tmp_path)])) == expected
    assert texts(Corpus.scan([f"file://{tmp_path}"])) == expected
    assert texts(Corpus.scan([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl")])) == expected
    assert texts(Corpus.scan([str(tmp_path), str(tmp_path / "a.jsonl")])) == expected


def test_hash_follows_content_and_how_it_is_read(tmp_path: Path) -> None:
    one = Corpus.scan([write(tmp_path / "a.txt", "x y")])
    (tmp_path / "moved").mkdir()
    assert Corpus.scan([write(tmp_path / "moved" / "a.txt", "x y")]).hash == one.hash
    assert Corpus.scan([str(tmp_path / "a.txt")], separator=" ").hash != one.hash
    assert Corpus.scan([write(tmp_path / "a.txt", "x z")]).hash != one.hash


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 100)
    corpus = Corpus.scan([path])
    write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 50)
    with pytest.raises(UserError, match="changed since"):
        list(corpus.read(60, 100))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no document contains any text"),
        ("a.txt", " \n\n ", "no document contains any text"),
        ("a.jsonl", '{"text": " "}\n\n', "no document contains any text"),
        ("a.csv", 'text\n" "\n', "no document contains any text"),
        ("a.md", "x", "unknown file type; supported suffixes are .jsonl, .jsonl.gz"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=f"text: .*{message}"):
        Corpus.scan([write(tmp_path / name, content)])


def test_missing_text(tmp_path: Path) -> None:
    for uri in (tmp_path / "missing.txt", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"text: .*no such file, or a folder without"):
            Corpus.scan([str(uri)])
    with pytest.raises(UserError, match="no filesystem"):
        Corpus.scan(["nosuch://bucket/x.txt"])
    with pytest.raises(UserError, match="text_separator"):
        Corpus.scan([str(tmp_path)], separator="")


PIECES = st.lists(st.text(alphabet="ab \n\r\té|<", max_size=12), min_size=1, max_size=12)


@pytest.mark.parametrize(
    "rule", [LINES, MARKED, PARAGRAPHS, separated_by("||")], ids=["lines", "marked", "paragraphs", "own"]
)
@given(pieces=PIECES, cuts=st.lists(st.integers(1, 9), min_size=1))
def test_chunking_does_not_matter(rule: Format, pieces: list[str], cuts: list[int]) -> None:
    joiner = {LINES: "\n", MARKED: "<|endoftext|>", PARAGRAPHS: "\n\n"}.get(rule, "||")
    data = joiner.join(pieces).encode()
    whole = Splitter(rule)
    expected = [*whole.feed(data), *whole.finish()]
    chunked, found, at = Splitter(rule), [], 0
    while at < len(data):
        size = cuts[at % len(cuts)]
        found += chunked.feed(data[at : at + size])
        at += size
    assert [*found, *chunked.finish()] == expected
    for offset, raw in expected:  # cutting may start at any document
        later = Splitter(rule, offset)
        assert next(iter([*later.feed(data[offset:]), *later.finish()])) == (offset, raw)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="xy \n", max_size=5), min_size=1, max_size=30),
    form=st.sampled_from(["jsonl", "marked", "paragraphs"]),
    bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_random_access_equals_sequential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str], form: str, bounds: tuple[int, int]
) -> None:
    for module in (base, delimited):
        monkeypatch.setattr(module, "STRIDE", 4)
    half = len(pieces) // 2
    for number, part in enumerate((["start", *pieces[:half]], pieces[half:])):
        for old in tmp_path.glob(f"{number}.*"):
            old.unlink()
        if form == "jsonl":
            write(tmp_path / f"{number}.jsonl", "\n".join(json.dumps({"text": p}) for p in part))
        else:
            write(tmp_path / f"{number}.txt", ("<|endoftext|>" if form == "marked" else "\n\n").join(part))
    corpus = Corpus.scan([str(tmp_path / "*")])
    everything = list(corpus.read())
    assert [d.doc for d in everything] == list(range(corpus.n_documents))
    first, stop = sorted(bounds)
    assert list(corpus.read(first, stop)) == everything[first:stop]
