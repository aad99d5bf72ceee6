from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.store.info import InfoConfig, describe, info
from dmm_ray.store.reader import ActivationStore, RowGroup
from dmm_ray.store.split import TEST, TRAIN, VALIDATION, Split
from dmm_ray.store.writer import write_shard


@pytest.fixture
def copy(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def test_groups_cover_the_layer_in_order(tiny_store: Path) -> None:
    store = ActivationStore.open(str(tiny_store))
    groups = store.row_groups(1)
    assert store.layers == (1, 2)
    assert store.d == 32
    assert sum(g.rows for g in groups) == store.rows
    assert [g.start for g in groups] == np.cumsum([0, *(g.rows for g in groups)])[:-1].tolist()
    keys = []
    for group in groups:
        rows = store.read(2, group)
        assert rows.activation.shape == (group.rows, 32)
        assert rows.activation.dtype == torch.float32
        assert (rows.doc.dtype, rows.position.dtype, rows.token_id.dtype) == (np.int64, np.int32, np.int32)
        np.testing.assert_array_equal(store.documents(2, group), rows.doc)
        keys += list(zip(rows.doc.tolist(), rows.position.tolist(), strict=True))
    assert keys == sorted(set(keys))
    assert min(position for _, position in keys) == 1


def test_columns_left_out_are_empty(tiny_store: Path) -> None:
    store = ActivationStore.open(f"file://{tiny_store}")
    rows = store.read(1, store.row_groups(1)[0], columns=("token_id",))
    assert rows.activation.shape == (0, 32)
    assert len(rows.doc) == len(rows.position) == 0
    assert len(rows.token_id) == store.row_groups(1)[0].rows


def test_statistics_are_those_of_the_rows(tiny_store: Path) -> None:
    store = ActivationStore.open(str(tiny_store))
    for layer in store.layers:
        x = torch.cat([store.read(layer, g).activation for g in store.row_groups(layer)]).double().numpy()
        moments = store.statistics(layer)
        assert moments.count == store.rows == len(x)
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moments.var, x.var(0), rtol=1e-9)


def test_select_parts_make_up_the_store(tiny_store: Path) -> None:
    store, split = ActivationStore.open(str(tiny_store)), Split(train=0.5, validation=0.25, test=0.25)
    parts = [store.select(2, split, part) for part in (TRAIN, VALIDATION, TEST)]
    assert sum(len(p.doc) for p in parts) == store.rows
    for part, rows in enumerate(parts):
        assert (split.of(rows.doc) == part).all()
        assert (np.diff(rows.doc) >= 0).all()
    one = store.document(2, int(parts[0].doc[0]))
    torch.testing.assert_close(parts[0].activation[: len(one.doc)], one.activation, atol=0, rtol=0)


def test_select_draws_whole_documents(tiny_store: Path) -> None:
    store = ActivationStore.open(str(tiny_store))
    everything = store.select(1, Split(), TRAIN)
    drawn = store.select(1, Split(), TRAIN, max_rows=200, seed=1)
    assert 100 < len(drawn.doc) <= 200
    for doc in np.unique(drawn.doc):
        assert (drawn.doc == doc).sum() == (everything.doc == doc).sum()
    assert set(store.select(1, Split(), TRAIN, 200, seed=2).doc) != set(drawn.doc)
    np.testing.assert_array_equal(store.select(1, Split(), TRAIN, 200, seed=1).doc, drawn.doc)
    assert len(np.unique(store.select(1, Split(), TRAIN, max_rows=1).doc)) == 1
    assert len(store.select(1, Split(train=1, validation=0, test=0), TEST).doc) == 0


def test_three_lines_of_pyarrow(tiny_store: Path) -> None:
    file = pq.ParquetFile(tiny_store / "layer_01" / "shard-000000.parquet")
    table = file.read()
    x = np.frombuffer(table["activation"].combine_chunks().buffers()[1], dtype="<f4").reshape(len(table), -1)
    rows = ActivationStore.open(str(tiny_store)).read(1, RowGroup(0, 0, 0, 0))
    np.testing.assert_array_equal(x[: len(rows.doc)], rows.activation.numpy())
    assert file.schema_arrow.metadata[b"dtype"] == b"float32"
    assert file.schema_arrow.metadata[b"d"] == b"32"


def test_bfloat16_shards_are_exact_in_groups_of_4096(tmp_path: Path) -> None:
    x = torch.randn(5000, 8).bfloat16()
    entry = write_shard(
        str(tmp_path / "s.parquet"), x, np.arange(5000), np.ones(5000, np.int32), np.zeros(5000, np.int32)
    )
    file = pq.ParquetFile(tmp_path / "s.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [4096, 904]
    raw = np.frombuffer(b"".join(v.as_py() for v in file.read()["activation"]), np.int16).copy()
    assert torch.equal(torch.from_numpy(raw).view(torch.bfloat16).reshape(5000, 8), x)
    assert entry.bytes == (tmp_path / "s.parquet").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_missing_layer(tiny_store: Path) -> None:
    store = ActivationStore.open(str(tiny_store))
    for call in (store.row_groups, store.statistics, lambda k: store.select(k, Split(), TRAIN)):
        with pytest.raises(UserError, match="has no layer 3; it has 1, 2"):
            call(3)


def test_truncated_by_a_byte(copy: Path) -> None:
    shard = copy / "layer_02" / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"layer_02/shard-000001.parquet: \d+ bytes, but its record says"):
        ActivationStore.open(str(copy))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer_01/shard-000000.parquet", "layer_01/shard-000000.parquet: missing"),
        ("shards/000002.safetensors", "shards/000002.safetensors: missing"),
        ("shards/000002.json", r"not finished \(5 of 6 units\)"),
        ("statistics.safetensors", "not finished"),
        ("manifest.json", "not an activation store"),
    ],
)
def test_missing_files(copy: Path, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=message):
        ActivationStore.open(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 9}', '{"version": 1}'])
def test_damaged_manifest(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json: ") as error:
        ActivationStore.open(str(copy))
    assert "\n" not in str(error.value)


def test_damaged_record_and_statistics(copy: Path) -> None:
    (copy / "statistics.safetensors").write_bytes(b"xx")
    with pytest.raises(UserError, match=r"statistics.safetensors: damaged"):
        ActivationStore.open(str(copy)).statistics(1)
    (copy / "shards" / "000000.json").write_text(json.dumps({"unit": 0}))
    with pytest.raises(UserError, match=r"000000.json: not a valid dmm-ray record"):
        ActivationStore.open(str(copy))


def test_info_says_what_it_is(copy: Path, tmp_path: Path) -> None:
    lines = "\n".join(describe(str(copy)))
    assert "layers     1, 2 of 4" in lines
    assert "6 of 6 done" in lines
    assert "60 documents" in lines
    assert info(InfoConfig(store=str(copy))) == str(copy)
    (copy / "shards" / "000005.json").unlink()
    assert "5 of 6 units" in "\n".join(describe(str(copy)))
    with pytest.raises(UserError, match="not an activation store"):
        info(InfoConfig(store=str(tmp_path / "nothing")))


def test_reading_loads_no_ray() -> None:
    import subprocess
    import sys

    check = "sys.exit(not {'ray', 'transformers'}.isdisjoint(sys.modules))"
    code = f"import sys, dmm_ray.store.reader; {check}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
