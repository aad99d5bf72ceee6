from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from stores import units_here

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.extract import ExtractConfig, extract
from dmm_ray.extraction.job import Extraction
from dmm_ray.store.reader import ActivationStore
from dmm_ray.units import pool
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.resources import ActorPool, plan_resources
from dmm_ray.units.unit import Unit


def shards(folder: Path) -> dict[str, bytes]:
    """Content of every file that must not depend on how the work was spread."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*/*")) if p.is_file()}


@pytest.fixture
def run(ray_local: None, tiny_options: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """``run(**changes)`` extracts the tiny text into ``tmp_path / "store"``."""

    def go(**changes: Any) -> Path:
        return Path(extract(ExtractConfig(**({**tiny_options, "out": str(tmp_path / "store")} | changes))))

    return go


def test_summary_and_folder(tiny_store: Path) -> None:
    summary = json.loads((tiny_store / "summary.json").read_text())
    figures = summary["figures"]
    assert set(summary) == {"figures", "inputs", "versions", "seconds"}
    assert figures["rows"] == ActivationStore.open(str(tiny_store)).rows
    assert figures["documents"] == 60
    assert figures["units"] == 6
    assert figures["nonfinite_rows"] == {"1": 0, "2": 0}
    assert figures["rows_per_s"] > 0
    names = {p.name for p in tiny_store.iterdir()}
    assert names == {
        "manifest.json",
        "summary.json",
        "statistics.safetensors",
        "shards",
        "layer_01",
        "layer_02",
    }


def test_resume_makes_only_what_is_missing(
    run: Callable[..., Path], tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    (store / "shards" / "000002.json").unlink()
    (store / "summary.json").unlink()
    shard = store / "layer_01" / "shard-000004.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    (store / "layer_01" / "shard-000002.parquet.tmp-0123abcd").write_bytes(b"left over")
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO), units_here():
        run()
    assert "4 of 6 units are done" in caplog.text
    assert shards(store) == shards(tiny_store)
    touched = {
        p.name for p, at in before.items() if p.exists() and p.stat().st_mtime_ns != at and p.parent != store
    }
    assert touched == {
        "000002.safetensors", "shard-000002.parquet",
        "000004.json", "000004.safetensors", "shard-000004.parquet",
    }  # fmt: skip
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run()
    assert "complete already" in caplog.text


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"layers": [1]}, "layers"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"window": 32}, "window"),
        ({"rows_per_shard": 500}, "rows_per_shard"),
        ({"keep_first": True}, "keep_first"),
        ({"tokens_per_doc": 3}, "tokens_per_doc"),
        ({"exclude": ["outliers"]}, "exclude"),
        ({"covariance": True}, "covariance"),
    ],
)
def test_another_configuration_is_refused(
    run: Callable[..., Path], tiny_store: Path, changes: dict[str, Any], option: str
) -> None:
    before = shards(tiny_store)
    with pytest.raises(UserError, match=f"^{option}: .* was made with .*, not .*; choose another --out"):
        run(out=str(tiny_store), **changes)
    assert shards(tiny_store) == before
    assert not (tiny_store / ".lock").exists()


def test_another_text_or_model_is_refused(
    run: Callable[..., Path], tiny_store: Path, tiny_text: Path, tiny_subject: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(tiny_text.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"^text: "):
        run(out=str(tiny_store), text=str(more))
    model = shutil.copytree(tiny_subject, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"^model \(config\.json\): "):
        run(out=str(tiny_store), model=str(model))


def test_moved_model_and_text_resume(
    run: Callable[..., Path], tiny_store: Path, tiny_text: Path, tiny_subject: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_subject, tmp_path / "elsewhere")
    text = shutil.copy(tiny_text, tmp_path)
    run(out=str(tiny_store), model=str(model), text=[str(text)])


def test_a_bad_record_beyond_the_scan_stops_the_job(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is found in an actor and must reach here as one line; then the fixed text works."""
    monkeypatch.setattr("dmm_ray.text.formats.base.SCANNED_BYTES", 0)
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "the cat sat on a mat"}\n{"txt": "x"}\n')
    with pytest.raises(UserError, match=r"^text: .*t.jsonl: line 2: no field 'text'") as error:
        run(text=str(text))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "store").rglob("*.parquet"))
    text.write_text('{"text": "the cat sat on a mat"}\n{"text": "x"}\n')
    with units_here():
        assert ActivationStore.open(str(run(text=str(text)))).manifest.corpus.documents == 2


def test_bad_record_leaves_nothing(run: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "fine"}\n{"txt": "x"}\nbroken\n')
    with pytest.raises(UserError, match=r"line 2: no field 'text'.* and 1 more; fix it, or skip up to N"):
        run(text=str(text))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "missing.jsonl"}, "text: .*missing.jsonl: no such file"),
        ({"model": "/nowhere/model"}, "model: no folder at /nowhere/model"),
        ({"layers": [1, 4]}, "layers: .* has no layer 4; choose from 0 to 3"),
        ({"window": 65}, "window: 65 exceeds the model's context of 64"),
        ({"block_path": "model.nothing"}, "block_path: "),
        ({"out": "/sys/store"}, "/sys/store: (no permission|cannot be created)"),
        ({"gpus_per_actor": 64}, "gpus_per_actor: 64 is more than"),
        ({"cpus_per_actor": 64}, "cpus_per_actor: 64 is more than"),
    ],
)
def test_bad_input_leaves_nothing(
    run: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(**changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.parquet"))


def test_out_that_holds_something_else(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"out: .*file is a file"):
        run(out=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"out: .* is not a store but contains other files \(file\)"):
        run(out=str(tmp_path))
    with pytest.raises(UserError, match="a file is in the way"):
        run(out=str(tmp_path / "file" / "store"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "at least 1"),
        ({"layers": [1, 1]}, "distinct"),
        ({"layers": [-1]}, "distinct block numbers from 0"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"window": 1}, "greater than or equal to 2"),
        ({"layer": 1}, "Extra inputs"),
    ],
)
def test_bad_configuration(tiny_options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExtractConfig(out="x", **{**tiny_options, **changes})


def test_a_unit_whose_process_dies_each_time_ends_the_job(
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As the kernel does when memory runs out. Ray would begin it again for ever, with pages on stdout each time."""

    class Dies(UnitActor):
        memory_options = "--batch-tokens"

        def work(self, unit: Unit) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGKILL)
            return {}

    monkeypatch.setattr(Extraction, "actor", lambda job, *_: (Dies, (job.out,)))
    monkeypatch.setattr(pool, "UNIT_RETRIES", 1)
    log = tmp_path / "store" / "errors" / "actors.log"
    says = (
        r"a worker process died \(Actor\w+Error\), most likely killed because memory ran out; "
        rf"lower --batch-tokens or use machines with more memory; full trace: {log}"
    )
    with pytest.raises(CheckFailed, match=f"^{says}$"):
        run()
    assert "ray.exceptions.Actor" in log.read_text()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err


def test_pool_defaults(ray_local: None) -> None:
    """4 logical CPUs, no GPU."""
    pool = plan_resources(ActorPool(), units=100)
    assert (pool.actors, pool.cpus, pool.gpus, pool.device) == (2, 2.0, 0.0, "cpu")
    assert plan_resources(ActorPool(), units=1).actors == 1
    many = plan_resources(ActorPool(actors=8, cpus_per_actor=1), units=100)
    assert (many.actors, many.fitting) == (8, 4)
