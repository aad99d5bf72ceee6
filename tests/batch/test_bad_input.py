"""What is refused, in one line, before anything is written; none of it starts a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_cases import LAYER
from pydantic import ValidationError
from stores import units_here

from dmm_ray import ActivationPrior, ActivationStore
from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, SampleConfig, ScoreConfig, StoreJobConfig
from dmm_ray.batch.outputs import make_table
from dmm_ray.batch.selection import Draws
from dmm_ray.batch.verbs import denoise, encode, sample, score
from dmm_ray.errors import UserError
from dmm_ray.prior import PriorConfig
from dmm_ray.store.manifest import read_record, record_name, shard_name
from dmm_ray.store.writer import write_shard
from dmm_ray.units.unit import Unit


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def saved(path: Path, **changes: Any) -> str:
    """An untrained prior's folder."""
    shape = {"d": 32, "layers": (LAYER,), "d_model": 16, "d_mlp": 16, "n_blocks": 1, "variance_floor": 1e-6}
    config = PriorConfig(**(shape | changes))
    ActivationPrior.untrained(
        config, torch.zeros(len(config.layers), config.d), torch.ones(len(config.layers), config.d)
    ).save_pretrained(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 16}, "activations: .* has d = 32, but the prior models d = 16"),
        ({"layers": (3,)}, "layer: .* has layers 1, 2, but the prior models 3; extract that layer"),
        ({"layers": (1, 2)}, r"layer: this prior models 1, 2 \(got None\)"),
    ],
)
def test_a_store_that_does_not_fit(
    options: dict[str, Any], out: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score(ScoreConfig(**{**options, "out": out, "prior": saved(tmp_path / "prior", **changes)}))
    assert not Path(out).exists()


@pytest.mark.parametrize("verb", ["score", "proxy", "denoise", "encode"])
def test_a_row_without_a_finite_answer(
    options: dict[str, Any], store: ActivationStore, out: str, tmp_path: Path, verb: str
) -> None:
    """Finite itself, and so far away that the prior's numbers overflow."""
    copy = Path(shutil.copytree(store.uri, tmp_path / "store"))
    groups = store.row_groups(LAYER)
    rows = store.read(LAYER, groups[0])
    x = rows.activation.clone()
    x[5] = 3e38
    shard = copy / shard_name(LAYER, groups[0].shard)
    write_shard(str(shard), x, rows.doc, rows.position, rows.token_id)
    record = copy / record_name(groups[0].shard)
    known = json.loads(record.read_text())
    known["files"][shard_name(LAYER, groups[0].shard)]["bytes"] = shard.stat().st_size
    record.write_text(json.dumps(known))
    given = {**options, "activations": str(copy), "out": out}
    calls: dict[str, Any] = {
        "score": lambda: score(ScoreConfig(**given, steps=2)),
        "proxy": lambda: score(ScoreConfig(**given, proxy=True)),
        "denoise": lambda: denoise(DenoiseConfig(**given, steps=2)),
        "encode": lambda: encode(EncodeConfig(**given)),
    }
    says = f"^activations: the result for document {rows.doc[5]}, position {rows.position[5]} contains NaN or Inf"
    with units_here(), pytest.raises(UserError, match=says):
        calls[verb]()
    assert not Path(out, "summary.json").exists()


def test_arguments_that_do_not_fit(options: dict[str, Any], out: str, tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide", d=600)
    for message, call in (
        ("features: expected distinct numbers", lambda: encode(EncodeConfig(out=out, features=[96], **options))),
        ("block: this prior has blocks 0 to 1", lambda: encode(EncodeConfig(out=out, block=2, **options))),
        ("probes: 0, the exact trace", lambda: score(ScoreConfig(**{**options, "prior": wide}, out=out, probes=0))),
        ("split: this prior was saved without", lambda: score(
            ScoreConfig(**{**options, "prior": saved(tmp_path / "plain")}, out=out, split="test"))),
        ("is the input store", lambda: denoise(DenoiseConfig(out=options["activations"], **options))),
        ("is not a store but contains other files", lambda: sample(
            SampleConfig(prior=options["prior"], n=1, out=str(tmp_path)))),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DenoiseConfig, {"u": 1.5}),
        (DenoiseConfig, {"u": float("nan")}),
        (DenoiseConfig, {"steps": 0}),
        (DenoiseConfig, {"distance": -1.0}),
        (ScoreConfig, {"probes": -1}),
        (ScoreConfig, {"rows": 0}),
        (ScoreConfig, {"activations": None}),
        (ScoreConfig, {"model": "m"}),
    ],
)
def test_fields_out_of_range(config: type[StoreJobConfig], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**{"prior": "p", "activations": "a", "out": "o", **fields})


def test_a_row_that_is_not_finite_is_named(
    store: ActivationStore, options: dict[str, Any], out: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(store.uri, tmp_path / "copy"))
    rows = store.read(LAYER, next(g for g in store.row_groups(LAYER) if g.shard == 3))
    rows.activation[17, 4] = torch.inf
    name = shard_name(LAYER, 3)
    entry = write_shard(str(copy / name), rows.activation, rows.doc, rows.position, rows.token_id)
    record = read_record(str(copy), 3).model_dump(mode="json")
    record["files"][name], record["nonfinite"][str(LAYER)] = entry.model_dump(), 1
    (copy / record_name(3)).write_text(json.dumps(record))
    where = rf"NaN or Inf at document {rows.doc[17]}, position {rows.position[17]};"
    with pytest.raises(UserError, match=where):
        score(ScoreConfig(**{**options, "activations": str(copy)}, out=out))
    assert not Path(out).exists()


def test_a_unit_without_rows_has_the_same_columns() -> None:
    full, none = Draws().rows(Unit(0, 0, 2)), Draws().rows(Unit(0, 2, 2))
    columns = ["nats", "stderr"]
    some = make_table(full, columns, {"nats": torch.tensor([1.0, torch.nan])})
    assert some["nats"].to_pylist() == [1.0, None]
    assert some["stderr"].to_pylist() == [None, None]
    assert make_table(none, columns, {}).schema == some.schema
