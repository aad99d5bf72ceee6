"""Places in files that are kept open between reads."""

from __future__ import annotations

import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmm_ray.text.corpus import Corpus
from dmm_ray.text.formats.base import TextFile
from dmm_ray.text.formats.cursors import Cursors

N = 3000
KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "csv", "csv.gz", "parquet", "arrow"]


@pytest.fixture(scope="module", params=KINDS)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents "0", "1", ... in one file of each kind."""
    path = tmp_path_factory.mktemp("cursors") / f"a.{request.param}"
    texts = [str(i) for i in range(N)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    rows = "\n".join(["text", *texts]).encode()
    table = pa.table({"text": texts})
    if request.param == "parquet":
        pq.write_table(table, path, row_group_size=1000)
    elif request.param == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        content = {
            "jsonl": lines,
            "jsonl.gz": gzip.compress(lines),
            "jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
            "txt": "<|endoftext|>".join(texts).encode(),
            "csv": rows,
            "csv.gz": gzip.compress(rows),
        }
        path.write_bytes(content[request.param])
    return Corpus.scan([str(path)])


def read(cursors: Cursors, file: TextFile, first: int, stop: int) -> None:
    found = [(number, content.text) for number, content in cursors.read(file, first, stop)]
    assert found == [(i, str(i)) for i in range(first, stop)]


def test_rising_reads_go_on_where_the_last_one_ended(corpus: Corpus) -> None:
    cursors = Cursors()
    for first in range(0, N, 50):
        read(cursors, corpus.files[0], first, first + 50)
    assert cursors.opened == 1


def test_gaps_are_skipped_and_going_back_starts_anew(corpus: Corpus) -> None:
    file, cursors = corpus.files[0], Cursors()
    is_indexed = len(file.starts) > 0
    for first in (10, 700, 1900):  # what is indexed is entered at the nearest place instead
        read(cursors, file, first, first + 5)
    assert cursors.opened == (1 if not is_indexed else 2 if file.uri.endswith("parquet") else 3)
    before = cursors.opened
    read(cursors, file, 1500, 1505)
    read(cursors, file, 1505, 1510)
    read(cursors, file, 1905, 1910)  # both places are kept
    assert cursors.opened == before + 1


def test_a_reader_that_is_left_early_keeps_its_place(corpus: Corpus) -> None:
    file, cursors = corpus.files[0], Cursors()
    assert next(cursors.read(file, 100, N))[0] == 100
    read(cursors, file, 101, 110)
    assert cursors.opened == 1


def test_interleaved_readers_have_places_of_their_own(corpus: Corpus) -> None:
    pairs = zip(corpus.read(5, 900), corpus.read(0, 895), strict=True)
    assert [(a.doc, b.doc, a.text, b.text) for a, b in pairs] == [
        (i + 5, i, str(i + 5), str(i)) for i in range(895)
    ]


def test_threads_read_at_once(corpus: Corpus) -> None:
    corpus = pickle.loads(pickle.dumps(corpus))

    def part(first: int) -> list[str | None]:
        return [d.text for start in range(first, N, 100) for d in corpus.read(start, start + 50)]

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(part, [0, 50, 0, 50]))
    for first, found in zip([0, 50, 0, 50], parts, strict=True):
        assert found == [str(i) for start in range(first, N, 100) for i in range(start, start + 50)]


def test_few_files_stay_open(corpus: Corpus) -> None:
    def handles() -> int:
        return sum(f.path == file.uri for f in psutil.Process().open_files())

    file, cursors = corpus.files[0], Cursors(limit=2)
    before = handles()
    readers = [cursors.read(file, first, first + 2) for first in (300, 200, 100)]
    for reader in readers:
        next(reader)
    assert (cursors.opened, handles()) == (3, before + 3)
    for reader in readers:
        list(reader)
    assert handles() == before + 2
    read(cursors, file, 102, 110)  # the two used last are kept, the first is not
    read(cursors, file, 202, 210)
    assert cursors.opened == 3


def test_a_finished_file_is_closed(corpus: Corpus) -> None:
    file, cursors = corpus.files[0], Cursors()
    read(cursors, file, N - 5, N)
    read(cursors, file, N - 5, N)
    assert cursors.opened == 2
