"""Text, stores, priors and scores on a local S3 server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from extractions import ALONE
from s3_server import s3_server
from stores import extract_here, units_here
from texts import make_texts

from dmm_ray import ActivationStore, files
from dmm_ray.batch.config import ScoreConfig
from dmm_ray.batch.verbs import score
from dmm_ray.errors import UserError
from dmm_ray.extraction.extract import ExtractConfig, extract
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train
from dmm_ray.units import lock

pytestmark = pytest.mark.slow
TEXT = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(120)).encode()
OPTIONS = {"layers": [1, 2], "dtype": "float32", "rows_per_shard": 700, "actors": 1, "cpus_per_actor": 1}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket that holds the text."""
    with s3_server() as uri:
        files.write_bytes(f"{uri}/text/a.jsonl", TEXT)
        yield uri


@pytest.fixture(scope="module")
def local(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store made of the same text on the local disk."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "a.jsonl").write_bytes(TEXT)
    store = folder / "store"
    return extract_here(model=str(tiny_subject), text=str(folder / "a.jsonl"), out=str(store), **OPTIONS)


def flags(model: Path, text: str, out: str) -> list[str]:
    options = {"model": model, "text": text, "out": out, **OPTIONS}
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, *ALONE, *args]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DMM_TEST_BY_LINE": "1"},
    )  # fmt: skip


def kill(run: subprocess.Popen[str]) -> None:
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()
    run.communicate()


def content(store: str) -> dict[str, bytes]:
    """The bytes of every shard, record and moments file, by its path in the store."""
    found = [uri for uri in files.list_files(store) if uri.count("/", len(store)) > 1]
    return {uri.removeprefix(store): files.read_bytes(uri) for uri in found}


def appears(run: subprocess.Popen[str], uri: str) -> None:
    while not files.exists(uri):
        assert run.poll() is None, run.communicate()[1]


def test_the_same_rows_as_on_a_local_disk(
    ray_local: None, bucket: str, local: str, tiny_subject: Path
) -> None:
    out = f"{bucket}/runs/one/store"
    extract(ExtractConfig(model=str(tiny_subject), text=f"{bucket}/text/", out=out, **OPTIONS))
    assert content(out) == content(local)
    assert not files.exists(f"{out}/.lock")
    far, near = ActivationStore.open(out), ActivationStore.open(local)
    assert far.rows == near.rows > 2000
    for layer in (1, 2):
        assert np.array_equal(far.statistics(layer).mean, near.statistics(layer).mean)
        for group in far.row_groups(layer)[::20]:
            ours, theirs = far.read(layer, group), near.read(layer, group)
            assert torch.equal(ours.activation, theirs.activation)
            assert np.array_equal(ours.doc, theirs.doc)
    assert verify(VerifyConfig(store=out)) == out


def test_a_prior_and_its_scores_are_those_of_a_local_disk(bucket: str, local: str, tmp_path: Path) -> None:
    training: dict[str, Any] = {"samples": 2048, "batch": 256, "workers": 0, "layer": 2, "wandb": "disabled"}
    scoring: dict[str, Any] = {
        "activations": local, "actors": 1, "cpus_per_actor": 1, "steps": 2, "split": "test", "precision": "float32",
    }  # fmt: skip
    found = []
    for store, out in ((f"{bucket}/runs/one/store", f"{bucket}/runs/one"), (local, str(tmp_path))):
        prior = train(TrainConfig(activations=store, out=f"{out}/prior", precision="float32", **training))
        with units_here():
            scores = score(ScoreConfig(prior=prior, out=f"{out}/scores", **scoring))
        found.append(content(scores))
        found[-1]["weights"] = files.read_bytes(f"{prior}/model.safetensors")
    assert found[0] == found[1]
    scores = f"{bucket}/runs/one/scores"
    assert verify(VerifyConfig(store=scores)) == scores


@pytest.mark.parametrize(("text", "out"), [("s3://none/a.jsonl", "{}/x"), ("{}/text/a.jsonl", "s3://none/x")])
def test_a_missing_bucket(bucket: str, tiny_subject: Path, text: str, out: str) -> None:
    places = {"text": text.format(bucket), "out": out.format(bucket)}
    with pytest.raises(UserError, match=r"s3://none/.*: The specified bucket does not exist; check the addr"):
        extract(ExtractConfig(model=str(tiny_subject), **places, **OPTIONS))
    assert not files.exists(f"{bucket}/x")


def test_killed_and_resumed_with_a_second_writer_beside(
    bucket: str,
    local: str,
    tiny_subject: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, out = f"{bucket}/text/*.jsonl", f"{bucket}/runs/two/store"
    first = start("extract", *flags(tiny_subject, text, out))
    try:
        appears(first, f"{out}/.lock")
        with caplog.at_level(logging.INFO), units_here(), pytest.raises(UserError) as refused:
            extract(ExtractConfig(model=str(tiny_subject), text=text, out=out, **OPTIONS))
        assert f"{out} is being written by process {first.pid} on " in str(refused.value)
        assert "watching it" in caplog.text
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()
        appears(first, f"{out}/shards/000000.json")
    finally:
        kill(first)
    before = {uri: stamp(uri) for uri in files.list_files(f"{out}/shards", (".json",))}
    units = ActivationStore.open(local).manifest.units
    assert 0 < len(before) < units
    assert files.exists(f"{out}/.lock")
    caplog.clear()
    monkeypatch.setattr(lock, "WATCH_S", 8.0)
    with caplog.at_level(logging.INFO), units_here():
        extract(ExtractConfig(model=str(tiny_subject), text=text, out=out, **OPTIONS))
    assert f"process {first.pid} on " in caplog.text
    assert "has stopped; its lock is taken over" in caplog.text
    assert f"resuming {out}: {len(before)} of {units} units are done" in caplog.text
    assert content(out) == content(local)
    assert before == {uri: stamp(uri) for uri in before}
    assert not files.exists(f"{out}/.lock")


def stamp(uri: str) -> object:
    """When an object was written."""
    fs, path = files.filesystem(uri)
    return fs.modified(path)
