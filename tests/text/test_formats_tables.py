"""Parquet, Arrow streams and saved Hugging Face datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmm_ray.errors import UserError
from dmm_ray.files import sha256
from dmm_ray.text.corpus import Corpus
from dmm_ray.text.documents import Document
from dmm_ray.text.formats import base

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TEXTS = [f"text {i} é" for i in range(2500)]


def save(path: Path, table: pa.Table, rows: int = 300) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return str(path)


def texts(*uris: str, text_field: str = "text") -> list[str | None]:
    corpus = Corpus.scan(uris, text_field=text_field)
    assert corpus.problems == []
    return [d.text for d in corpus.read()]


SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


@SUFFIXES
def test_the_wanted_column_is_read(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"id": range(2500), "text": TEXTS, "body": TEXTS[::-1]})
    uri = save(tmp_path / f"a{suffix}", table)
    assert texts(uri) == TEXTS
    assert texts(uri, text_field="body") == TEXTS[::-1]


@SUFFIXES
@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_kinds_of_text_columns(tmp_path: Path, suffix: str, kind: pa.DataType) -> None:
    column = pa.array(TEXTS[:700]).cast(kind)
    assert texts(save(tmp_path / f"a{suffix}", pa.table({"text": column}))) == TEXTS[:700]


@SUFFIXES
def test_bad_rows(tmp_path: Path, suffix: str) -> None:
    invalid = pa.array([b"ok", b"\xff", None, b""]).view(pa.binary())
    column = pa.StringArray.from_buffers(4, *invalid.buffers()[1:], invalid.buffers()[0])
    corpus = Corpus.scan([save(tmp_path / f"a{suffix}", pa.table({"text": column}))])
    found = list(corpus.read())
    assert [d.text for d in found] == ["ok", None, None, ""]
    assert found[1].error.endswith(f"a{suffix}: row 2: not valid UTF-8")
    assert found[2].error.endswith("row 3: field 'text' is null")
    assert corpus.problems == found[1:3]


@SUFFIXES
def test_other_columns(tmp_path: Path, suffix: str) -> None:
    uri = save(tmp_path / f"a{suffix}", pa.table({"id": [1, 2], "none": pa.nulls(2)}))
    errors = {
        "id": "field 'id' is not a string",
        "none": "field 'none' is null",
        "text": "no field 'text'; name the one",
    }
    for field, message in errors.items():
        problems = Corpus.scan([uri], text_field=field).problems
        assert len(problems) == 2
        assert f"row 1: {message}" in problems[0].error


@SUFFIXES
def test_messages(tmp_path: Path, suffix: str) -> None:
    column = [CHAT, None, [], [{"role": "user", "content": None}], CHAT[:1]]
    uri = save(tmp_path / f"a{suffix}", pa.table({"id": range(5), "messages": column}))
    found = list(Corpus.scan([uri]).read())
    assert found[0] == Document(0, None, None, tuple(CHAT))
    assert found[4] == Document(4, None, None, tuple(CHAT[:1]))
    reasons = [(d.error or "").partition(f"row {d.doc + 1}: ")[2] for d in found[1:4]]
    assert reasons == [
        "field 'messages' is null",
        "field 'messages' is an empty list",
        "'content' of message 1 is null",
    ]


@SUFFIXES
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    bounds=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=6),
)
def test_random_access_equals_sequential(
    tmp_path: Path, suffix: str, sizes: list[int], bounds: list[tuple[int, int]]
) -> None:
    batches = [pa.record_batch({"text": pa.array(TEXTS[:size], pa.string())}) for size in [*sizes, 1]]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        with pq.ParquetWriter(path, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=64)
    else:
        with pa.ipc.new_stream(path, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    expected = [text for size in [*sizes, 1] for text in TEXTS[:size]]
    corpus = Corpus.scan([str(path)])
    assert [d.text for d in corpus.read()] == expected
    for first, count in bounds:
        assert [d.text for d in corpus.read(first, first + count)] == expected[first : first + count]


@SUFFIXES
def test_damaged_tables_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    whole = Path(save(path, pa.table({"text": TEXTS}))).read_bytes()
    flipped = bytearray(whole)
    flipped[100:400] = bytes(300)
    for content in (b"", whole[:3], whole[:-8], whole[:-1], whole[: len(whole) // 2], whole + b"x", flipped):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=f"text: {path}: damaged, truncated or not in the format of its suffix"
        ):
            Corpus.scan([str(path)])


def test_two_joined_streams_are_refused(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "a.arrow", pa.table({"text": TEXTS})))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="more data after the end of the stream"):
        Corpus.scan([str(path)])


def test_hashes(tmp_path: Path) -> None:
    arrow = save(tmp_path / "a.arrow", pa.table({"text": TEXTS}))
    assert Corpus.scan([arrow]).files[0].sha256 == sha256(arrow)
    parquet = tmp_path / "a.parquet"
    hashes = {Corpus.scan([save(parquet, pa.table({"text": column}))]).hash for column in (TEXTS, TEXTS[1:])}
    assert len({*hashes, Corpus.scan([save(parquet, pa.table({"text": TEXTS}))]).hash}) == 2


def test_only_the_first_rows_of_parquet_are_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmm_ray.text.formats import tables

    for module in (base, tables):
        monkeypatch.setattr(module, "SCANNED_BYTES", 1000)
    column = [*TEXTS[:1000], None]
    corpus = Corpus.scan([save(tmp_path / "a.parquet", pa.table({"text": column}))])
    assert (corpus.n_documents, corpus.problems) == (1001, [])
    assert next(corpus.read(1000)).error.endswith("row 1001: field 'text' is null")


def test_a_saved_dataset(tmp_path: Path) -> None:
    """The layout of ``DatasetDict.save_to_disk``, with what later ``map`` calls leave beside the data."""
    for split, start in (("test", 0), ("train", 100)):
        names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
        for i, name in enumerate(names):
            save(tmp_path / split / name, pa.table({"text": TEXTS[start + 10 * i :][:10]}))
        save(tmp_path / split / "cache-0123456789abcdef.arrow", pa.table({"text": ["cached"]}))
        save(tmp_path / split / "data-00000-of-00001.arrow", pa.table({"text": ["of an older save"]}))
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(str(tmp_path)) == [*TEXTS[:20], *TEXTS[100:120]]
    assert texts(str(tmp_path / "train" / "*.arrow")) == TEXTS[100:120]
    assert texts(str(tmp_path / "train" / "cache-0123456789abcdef.arrow")) == ["cached"]
    (tmp_path / "test" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"test/state.json: lists no _data_files"):
        Corpus.scan([str(tmp_path)])


def test_an_arrow_folder_without_a_state(tmp_path: Path) -> None:
    for name in ("dataset-train", "cache-1", "indices", "indices-2"):
        save(tmp_path / f"{name}.arrow", pa.table({"text": [name]}))
    assert texts(str(tmp_path)) == ["dataset-train"]
