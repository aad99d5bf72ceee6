from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from stores import extract_here

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.store.manifest import read_record
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.writer import write_shard


@pytest.fixture
def copy(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def test_whole_store_passes_with_rows_computed_again(
    tiny_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert verify(VerifyConfig(store=str(tiny_store))) == str(tiny_store)
    assert "documents: 0 findings" in caplog.text


def test_flipped_bit(copy: Path) -> None:
    shard = copy / "layer_01" / "shard-000001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        CheckFailed, match=r"layer_01/shard-000001.parquet: its content is not what was written"
    ):
        verify(VerifyConfig(store=str(copy)))


def test_every_finding_is_logged(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "layer_01" / "shard-000000.parquet").unlink()
    (copy / "shards" / "000003.json").unlink()
    shutil.copy(copy / "layer_02" / "shard-000001.parquet", copy / "layer_02" / "shard-000099.parquet")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"window": 32}))
    with pytest.raises(CheckFailed, match="more findings") as error:
        verify(VerifyConfig(store=str(copy)))
    assert "\n" not in str(error.value)
    for finding in (
        "layer_01/shard-000000.parquet: missing",
        "shards/000003.json: missing",
        "layer_02/shard-000099.parquet: unexpected file",
        "manifest.json: its configuration does not match",
    ):
        assert finding in caplog.text


def test_a_shard_twice_is_named_with_its_source(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal lengths: only the hash tells. And a record in the place of another's."""
    shards = {p: p.stat().st_size for p in sorted((copy / "layer_01").iterdir())}
    source = (copy / "layer_01" / "shard-000000.parquet").read_bytes()
    target = copy / "layer_01" / "shard-000003.parquet"
    target.write_bytes(source)
    record = json.loads((copy / "shards" / "000003.json").read_text())
    record["files"]["layer_01/shard-000003.parquet"]["bytes"] = len(source)
    (copy / "shards" / "000003.json").write_text(json.dumps(record))
    assert len(shards) == 6
    with pytest.raises(
        CheckFailed, match=r"shard-000003.parquet: .*it is a copy of layer_01/shard-000000.parquet"
    ):
        verify(VerifyConfig(store=str(copy)))
    shutil.copy(copy / "shards" / "000001.json", copy / "shards" / "000002.json")
    with pytest.raises(CheckFailed, match="more findings"):
        verify(VerifyConfig(store=str(copy)))
    assert "shards/000002.json: is the record of unit 1, from document" in caplog.text


def test_moments_are_said_by_layer(tiny_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        verify(VerifyConfig(store=str(tiny_store)))
    for layer in (1, 2):
        assert (
            f"layer {layer}    {ActivationStore.open(str(tiny_store)).rows:,} rows; rms of the mean"
            in caplog.text
        )


def test_a_store_of_chosen_rows_passes(
    tiny_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen: dict[str, Any] = {
        "window": 20, "long_documents": "split", "tokens_per_doc": 5, "min_position": 2, "covariance": True,
        "exclude": ["outliers"], "rows_per_shard": None,
    }  # fmt: skip
    store = extract_here(**(tiny_options | chosen | {"out": str(tmp_path / "store")}))
    with caplog.at_level(logging.INFO):
        verify(VerifyConfig(store=store, sample_documents=20))
    assert "recomputed 20 documents: 0 findings" in caplog.text
    opened = ActivationStore.open(store)
    rows = [opened.document(1, doc) for doc in range(60)]
    assert max(len(r.doc) for r in rows) == 5
    assert min(r.position.min() for r in rows if len(r.doc)) >= 2
    assert max(r.position.max() for r in rows if len(r.doc)) > 20


def test_statistics_of_another_store(copy: Path) -> None:
    shutil.copy(copy / "shards" / "000000.safetensors", copy / "statistics.safetensors")
    with pytest.raises(CheckFailed, match="not the merge of the units' moments"):
        verify(VerifyConfig(store=str(copy)))


def test_rows_of_another_model_are_found(copy: Path) -> None:
    """Shards that are whole but wrong: layer 1 holds layer 2's rows, its records agree."""
    store = ActivationStore.open(str(copy))
    for unit in range(store.manifest.units):
        record = read_record(str(copy), unit)
        rows = [store.read(2, g) for g in store.row_groups(2) if g.shard == unit]
        name = f"layer_01/shard-{unit:06d}.parquet"
        entry = write_shard(
            str(copy / name), rows[0].activation, rows[0].doc, rows[0].position, rows[0].token_id
        )
        changed = record.model_copy(update={"files": {**record.files, name: entry}})
        (copy / "shards" / f"{unit:06d}.json").write_text(changed.model_dump_json())
    with pytest.raises(CheckFailed, match=r"layer 1, document \d+: stored rows differ from the model's"):
        verify(VerifyConfig(store=str(copy)))
    assert pq.ParquetFile(copy / name).metadata.num_rows == len(rows[0].doc)
    assert np.isfinite(rows[0].activation.numpy()).all()


def test_changed_model_text_or_absence(
    copy: Path, tiny_subject: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_subject, tmp_path / "model")
    verify(VerifyConfig(store=str(copy), model=str(model)))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(
        CheckFailed, match=r"model.safetensors is no longer what the store was extracted with"
    ):
        verify(VerifyConfig(store=str(copy), model=str(model)))
    verify(VerifyConfig(store=str(copy), model=str(tmp_path / "gone")))
    assert "no rows recomputed: model: no folder at" in caplog.text


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an activation store"):
        verify(VerifyConfig(store=str(tmp_path)))
