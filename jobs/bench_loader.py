"""Benchmark of the training loader from the page cache: ours, row groups alone, row by row from a memory map.

Run with ``python jobs/bench.py train``. All read the same bfloat16 rows. Ours draws batches as ``dmm train``
does with one worker, including loading the first window; the batches are discarded.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dmm_ray.store.manifest import CorpusEntry, Manifest, Record, SubjectEntry, shard_name
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import Split
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.store.writer import write_shard
from dmm_ray.training.loader import Loader

BATCH, UNIT_ROWS, DOCUMENT_ROWS, WINDOW_ROWS = 4096, 1 << 15, 128, 1 << 17
READERS = 2
PLAIN_BATCHES = 20
EPOCHS = 4


def make_store(folder: str, rows: int, d: int) -> tuple[ActivationStore, Tensor]:
    """A single-layer store without a subject, and the same rows memory-mapped from a flat file."""
    x = torch.randn(UNIT_ROWS, d).bfloat16()
    documents, units = UNIT_ROWS // DOCUMENT_ROWS, max(1, rows // UNIT_ROWS)
    position = np.tile(np.arange(DOCUMENT_ROWS, dtype=np.int32), documents)
    flat = Path(folder, "rows.bin")
    with flat.open("wb") as f:
        for unit in range(units):
            doc = np.repeat(np.arange(unit * documents, (unit + 1) * documents), DOCUMENT_ROWS)
            write_shard(f"{folder}/{shard_name(0, unit)}", x, doc, position, position)
            f.write(x.view(torch.uint8).numpy().data)
    records = [
        Record(
            config_hash="", unit=unit, first_document=unit * documents, documents=documents, failed=(), long=0,
            tokens=UNIT_ROWS, padding=0, rows=UNIT_ROWS, excluded=0, nonfinite={}, outliers={}, files={},
        )
        for unit in range(units)
    ]  # fmt: skip
    n = units * UNIT_ROWS
    mapped = torch.from_file(str(flat), shared=True, size=n * d, dtype=torch.bfloat16).view(n, d)
    return ActivationStore(folder, make_manifest(d, documents, units), records), mapped


def make_manifest(d: int, documents: int, units: int) -> Manifest:
    """The manifest of a store whose rows do not come from text."""
    subject: dict[str, Any] = {"id": "none", "revision": None, "weights_hash": "", "files": {}}
    corpus: dict[str, Any] = {"uris": ("none",), "hash": "", "text_field": "text", "separator": None}
    return Manifest(
        subject=SubjectEntry(**subject, block_path=None, n_layers=1, context=DOCUMENT_ROWS),
        tokenizer_hash="", layers=(0,), dtype="bfloat16", compute_dtype="bfloat16", d=d,
        corpus=CorpusEntry(**corpus, documents=documents * units), window=DOCUMENT_ROWS, kept=TokenSelection(),
        exclude=(), covariance=False, seed=0, documents_per_unit=documents, units=units,
    )  # fmt: skip


def rate(pieces: Iterable[Tensor]) -> float:
    """MB/s at which the tensors of an iterable arrive."""
    started, read = time.perf_counter(), 0
    for piece in pieces:
        read += piece.nbytes
    return read / 1e6 / (time.perf_counter() - started)


def ours(store: ActivationStore) -> float:
    """MB/s of ``EPOCHS`` epochs of batches, including loading the first window."""
    loader = Loader(store, 0, Split(), WINDOW_ROWS, seed=0)
    batches = loader.batches(0, BATCH, slice(0, BATCH))
    with closing(batches):
        return rate(islice(batches, EPOCHS * loader.order.epoch_rows // BATCH))


def row_groups(store: ActivationStore) -> float:
    """MB/s of reading every row group in storage order with as many threads as ours, discarding the rows."""
    with ThreadPoolExecutor(READERS) as readers:
        return rate(readers.map(lambda group: store.read(0, group).activation, store.row_groups(0)))


def per_row(rows: Tensor) -> float:
    """MB/s of PyTorch's DataLoader: shuffled rows fetched one at a time and stacked."""
    return rate(islice(DataLoader(rows, BATCH, shuffle=True), PLAIN_BATCHES))


def bench(say: Callable[[str], None], rows: int = 11 * UNIT_ROWS, d: int = 2048, rounds: int = 5) -> None:
    """MB/s of each method in turns, medians; uses about ``2 * rows * d * 2`` bytes in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        store, mapped = make_store(folder, rows, d)
        ways = {
            "ours": lambda: ours(store),
            "row groups alone": lambda: row_groups(store),
            "row by row": lambda: per_row(mapped),
        }
        found = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    medians = {name: statistics.median(rates[name] for rates in found) for name in ways}
    for name, median in medians.items():
        say(f"loader d={d} {name:18} {median:8,.0f} MB/s   ours is {medians['ours'] / median:.2f}x")
