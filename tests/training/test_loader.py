"""The loader against the plain way: a window's rows read whole, then gathered in the order of the permutation."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.store.manifest import DTYPES, CorpusEntry, Manifest, Record, SubjectEntry, shard_name
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TRAIN, Split
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.store.writer import write_shard
from dmm_ray.training.loader import Loader

SPLIT = Split(seed=1, train=0.8, validation=0.1, test=0.1)
SIZE = 25


def make_store(folder: Path, units: int, docs: int, rows: int, d: int = 3, dtype: str = "float32"):
    """Layer 0 without a subject: ``units`` shards of ``docs`` documents of ``rows`` rows, all different."""
    n = docs * rows
    values = torch.arange(units * n * d).reshape(units, n, d).to(DTYPES[dtype])
    position = np.tile(np.arange(1, rows + 1, dtype=np.int32), docs)
    records = []
    for unit in range(units):
        doc = np.repeat(np.arange(unit * docs, (unit + 1) * docs), rows)
        entry = write_shard(f"{folder}/{shard_name(0, unit)}", values[unit], doc, position, position)
        records.append(
            Record(
                config_hash="", unit=unit, first_document=unit * docs, documents=docs, failed=(), long=0,
                tokens=n, padding=0, rows=n, excluded=0, nonfinite={}, outliers={}, files={shard_name(0, unit): entry},
            )
        )  # fmt: skip
    manifest = Manifest(
        subject=SubjectEntry(
            id="none", revision=None, weights_hash="", files={}, block_path=None, n_layers=1, context=64
        ),
        tokenizer_hash="", layers=(0,), dtype=dtype, compute_dtype=dtype, d=d,
        corpus=CorpusEntry(uris=("none",), hash="", documents=units * docs, text_field="text", separator=None),
        window=64, kept=TokenSelection(), exclude=(), covariance=False, seed=0, documents_per_unit=docs, units=units,
    )  # fmt: skip
    return ActivationStore(str(folder), manifest, records)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("store"), units=13, docs=6, rows=4)


def plain(loader: Loader, samples: int) -> Tensor:
    """The first ``samples`` rows of the run."""
    parts: list[Tensor] = []
    for window in loader.order.from_sample(0):
        groups = [loader.store.read(0, loader.groups[g]) for g in window.groups]
        rows = torch.cat([r.activation[torch.from_numpy(loader.split.of(r.doc) == TRAIN)] for r in groups])
        parts.append(rows[torch.from_numpy(loader.order.permutation(window))])
        if sum(map(len, parts)) >= samples:
            return torch.cat(parts)[:samples]
    raise AssertionError


def take(batches: Generator[Tensor], n: int) -> list[Tensor]:
    found = [next(batches).clone() for _ in range(n)]
    batches.close()
    return found


@pytest.mark.parametrize("window_rows", [10, 90, 10_000])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_every_world_sees_the_plain_order(store, world, window_rows):
    loader = Loader(store, 0, SPLIT, window_rows, seed=4)
    expected = plain(loader, 30 * SIZE).reshape(30, SIZE, 3)
    assert 3 * loader.order.epoch_rows < 30 * SIZE
    shares = [slice(SIZE * rank // world, SIZE * (rank + 1) // world) for rank in range(world)]
    assert sum(s.stop - s.start for s in shares) == SIZE
    for share in shares:
        found = take(loader.batches(0, SIZE, share), 30)
        assert torch.equal(torch.stack(found), expected[:, share])


def test_the_stored_dtype_is_kept_to_the_bit(tmp_path):
    loader = Loader(make_store(tmp_path, 4, 5, 4, d=8, dtype="bfloat16"), 0, SPLIT, 30, seed=0)
    found = torch.cat(take(loader.batches(0, 10, slice(0, 10)), 12))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), plain(loader, 120).view(torch.int16))


@pytest.mark.parametrize("first", [1, 4, 9, 10, 23])
def test_a_resumed_run_goes_on_where_it_stopped(store, first):
    share = slice(5, 18)
    whole = take(Loader(store, 0, SPLIT, 90, seed=4).batches(0, SIZE, share), first + 12)
    resumed = take(Loader(store, 0, SPLIT, 90, seed=4).batches(first, SIZE, share), 12)
    assert torch.equal(torch.stack(resumed), torch.stack(whole[first:]))


@pytest.mark.parametrize("window_rows", [90, 10_000])
def test_every_epoch_holds_the_same_rows_in_another_order(store, window_rows):
    loader = Loader(store, 0, SPLIT, window_rows, seed=4)
    n = loader.order.epoch_rows
    train = store.select(0, SPLIT, TRAIN).activation
    epochs = take(loader.batches(0, n, slice(0, n)), 3)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], train)
    assert not any(torch.equal(epoch, other) for epoch, other in pairwise(epochs))


def test_a_batch_mixes_thousands_of_documents(tmp_path):
    store = make_store(tmp_path, units=12, docs=1000, rows=4, d=1)
    loader = Loader(store, 0, SPLIT, 1 << 20, seed=0)
    (batch,) = take(loader.batches(3, 4096, slice(0, 4096)), 1)
    assert len(torch.unique(batch[:, 0] // 4)) > 3000


def spoil(store: ActivationStore, unit: int, row: int, value: float) -> None:
    """Write a shard again with a value that is not finite."""
    (group,) = [g for g in store.row_groups(0) if g.shard == unit]
    rows = store.read(0, group)
    rows.activation[row, -1] = value
    write_shard(f"{store.uri}/{shard_name(0, unit)}", *rows)


def test_a_row_that_is_not_finite_is_named_when_its_window_comes(tmp_path):
    store = make_store(tmp_path, units=13, docs=6, rows=4)
    loader = Loader(store, 0, Split(train=1, validation=0, test=0), window_rows=72, seed=4)
    unit = list(loader.order.windows(0))[2].groups[-1]
    spoil(store, unit, row=9, value=np.inf)
    before = threading.active_count()
    batches = loader.batches(0, 24, slice(0, 12))
    assert len([next(batches) for _ in range(6)]) == 6
    named = rf"layer 0 contains NaN or Inf at document {unit * 6 + 2}, position 2;"
    with pytest.raises(UserError, match=named):
        next(batches)
    assert threading.active_count() == before


def test_closing_leaves_no_thread(store):
    before = threading.active_count()
    batches = Loader(store, 0, SPLIT, 90, seed=4).batches(0, SIZE, slice(0, SIZE))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(KeyError):
        consume_and_fail(store)
    assert threading.active_count() == before


def consume_and_fail(store: ActivationStore) -> None:
    for _ in Loader(store, 0, SPLIT, 90, seed=4).batches(0, SIZE, slice(0, SIZE)):
        raise KeyError


def test_a_missing_file_is_raised_as_it_is(tmp_path):
    store = make_store(tmp_path, units=2, docs=6, rows=4)
    loader = Loader(store, 0, SPLIT, 10, seed=0)
    for path in tmp_path.glob("layer_00/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="shard-"):
        next(loader.batches(0, 5, slice(0, 5)))


def windows_in_memory(least_bytes: int) -> set[int]:
    """Addresses of the tensors' storages of such a size."""
    found = [o.untyped_storage() for o in gc.get_objects() if type(o) is Tensor]
    return {s.data_ptr() for s in found if s.nbytes() >= least_bytes}


def test_a_worker_of_two_holds_half_of_two_windows(store):
    gc.collect()
    loader = Loader(store, 0, Split(train=1, validation=0, test=0), window_rows=144, seed=4)
    batches, half = loader.batches(0, 24, slice(12, 24)), (72 + 1) * 3 * 4
    before = windows_in_memory(half)
    for _ in range(40):
        batch = next(batches)
        assert batch.shape == (12, 3)
        assert batch.untyped_storage().nbytes() <= half
        assert len(windows_in_memory(half) - before) <= 2
    batches.close()


def test_windows_take_turns_in_the_same_memory(store):
    loader = Loader(store, 0, Split(train=1, validation=0, test=0), window_rows=72, seed=4)
    batches, places = loader.batches(0, SIZE, slice(0, SIZE)), list[int]()
    for _ in range(60):
        storage = next(batches).untyped_storage()
        if storage.nbytes() > SIZE * 3 * 4:  # a view of a window
            places.append(storage.data_ptr())
    batches.close()
    assert len(places) > 30
    assert len(set(places)) == 2


def test_waiting_is_counted(store):
    loader = Loader(store, 0, SPLIT, 90, seed=4)
    assert loader.waited == 0
    batches = loader.batches(0, SIZE, slice(0, SIZE))
    next(batches)
    first = loader.waited
    assert first > 0
    next(batches)
    assert loader.waited == first
    batches.close()


def test_validation_rows_alone_are_no_training_rows(store):
    with pytest.raises(UserError, match="no document falls into the train part"):
        Loader(store, 0, Split(train=0, validation=1, test=0), 90, seed=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_pinned_for_a_gpu(store):
    loader = Loader(store, 0, SPLIT, 90, seed=4, pin=True)
    batches = loader.batches(0, SIZE, slice(0, SIZE))
    found = [next(batches) for _ in range(10)]  # pinned windows are not overwritten
    assert sum(batch.is_pinned() for batch in found) >= 5
    assert torch.equal(torch.cat(found), plain(loader, 10 * SIZE))
    batches.close()
