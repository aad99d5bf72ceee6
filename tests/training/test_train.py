import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dmm_ray import ActivationPrior, ActivationStore
from dmm_ray.activations.split import TEST, TRAIN, Split
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig, preset_shape
from dmm_ray.training.loader import Loader
from dmm_ray.training.train import train


def config(store: str, out: Path, **changes) -> TrainConfig:
    fields = {
        "activations": store,
        "out": str(out),
        "layer": 2,
        "samples": 24 * 256,
        "batch": 256,
        "levels_per_batch": 64,
        "d_model": 32,
        "d_mlp": 64,
        "n_blocks": 2,
        "lr": 3e-3,
        "workers": 0,
        "log_every": 512,
        "checkpoint_every": 6 * 256,
        "shuffle_rows": 2000,
        "split": Split(seed=1),
    }
    return TrainConfig(**(fields | changes))


def curve(out: Path | str) -> list[tuple[int, float, float | None]]:
    lines = (Path(out) / "stats.jsonl").read_text().splitlines()
    return [(r["samples"], r["loss"], r["validation_loss"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def finished(train_store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "prior"
    return Path(train(config(train_store, out)))


def test_a_run_learns_and_leaves_a_prior(finished, train_store):
    records = curve(finished)
    assert [r[0] for r in records] == list(range(512, 24 * 256 + 1, 512))
    assert records[-1][1] < records[0][1] - 0.2
    assert records[-1][2] is not None
    prior = ActivationPrior.from_pretrained(str(finished))
    assert prior.layers == (2,)
    assert prior.config.split["seed"] == 1
    assert (
        prior.config.subject["weights_hash"]
        == ActivationStore.open(train_store).manifest.subject.weights_hash
    )
    untrained = ActivationPrior.untrained(prior.config, prior.normalizer.mean, prior.normalizer.var)
    rows = ActivationStore.open(train_store).select(2, Split(seed=1), TEST).activation.float()
    z, noise = prior.normalizer.normalize(rows), torch.randn(rows.shape)
    losses = [(p.velocity(0.5 * (z + noise), 0.5) - (noise - z)).square().mean() for p in (prior, untrained)]
    assert losses[0] < 0.9 * losses[1]
    assert not (finished / "checkpoints").exists()
    assert json.loads((finished / "summary.json").read_text())["figures"]["samples"] == 24 * 256


def test_a_finished_run_returns_at_once(finished, train_store):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert train(config(train_store, finished)) == str(finished)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_is_refused_by_field(finished, train_store):
    with pytest.raises(UserError, match=r"lr = 0\.003, not 0\.001"):
        train(config(train_store, finished, lr=1e-3))


def test_ray_workers_see_the_same_samples(finished, train_store, ray_local, tmp_path):
    one = train(config(train_store, tmp_path / "one", workers=1, cpus_per_worker=1))
    two = train(config(train_store, tmp_path / "two", workers=2, cpus_per_worker=1, precision="float32"))
    reference = train(config(train_store, tmp_path / "zero", precision="float32"))
    for a, b in zip(curve(one), curve(finished), strict=True):
        assert a[:2] == pytest.approx(b[:2], rel=2e-3)
    for a, b in zip(curve(two), curve(reference), strict=True):
        assert a[:2] == pytest.approx(b[:2], rel=1e-4)


@pytest.mark.fault
def test_killed_and_started_again_is_bit_equal(finished, train_store, tmp_path):
    torch.set_num_threads(2)  # as the other process has: another number of threads sums in another order
    out = tmp_path / "killed"
    changes = {"samples": 60 * 256, "log_every": 256, "checkpoint_every": 2 * 256}
    undisturbed = train(config(train_store, tmp_path / "undisturbed", **changes))
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config(train_store, out, **changes).model_dump(mode="json")))
    command = [sys.executable, "-m", "dmm_ray", "train", "--config", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "2"})
    deadline = time.monotonic() + 120
    while not checkpoint.complete(str(out)) and time.monotonic() < deadline:
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    assert train(config(train_store, out, **changes)) == str(out)
    assert curve(out) == curve(undisturbed)
    weights = [(Path(p) / "model.safetensors").read_bytes() for p in (out, undisturbed)]
    assert weights[0] == weights[1]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    for samples in (100, 200, 300):
        checkpoint.save(str(tmp_path), samples, {"x": torch.full((2,), float(samples))}, keep=2)
    assert checkpoint.complete(str(tmp_path)) == [200, 300]
    newest = tmp_path / "checkpoints" / f"{300:015d}" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    samples, tensors = checkpoint.load_newest(str(tmp_path))
    assert (samples, tensors["x"][0]) == (200, 200)
    assert "damaged" in caplog.text


def test_only_training_documents_are_read(train_store):
    store, split = ActivationStore.open(train_store), Split(seed=1)
    loader = Loader(store, 2, split, window_rows=1500, seed=0)
    rows = store.select(2, split, TRAIN).activation
    assert loader.order.epoch_rows == len(rows)
    n = len(rows) // 4
    batches = loader.batches(0, n, slice(0, n))
    seen = torch.cat([next(batches) for _ in range(4)])
    every = {r.tobytes() for r in rows.view(torch.int16).numpy()}
    assert {r.tobytes() for r in seen.view(torch.int16).numpy()} <= every
    assert len(torch.unique(seen.view(torch.int16), dim=0)) > 0.95 * len(
        torch.unique(rows.view(torch.int16), dim=0)
    )


def test_bad_input_is_named(train_store, tmp_path):
    with pytest.raises(UserError, match="not an activation store"):
        train(config(str(tmp_path), tmp_path / "out"))
    with pytest.raises(UserError, match=r"layer: .* holds layers 1, 2; name one with --layer"):
        train(config(train_store, tmp_path / "out", layer=None))
    with pytest.raises(UserError, match=r"layer: .* holds layers 1, 2"):
        train(config(train_store, tmp_path / "out", layer=3))
    with pytest.raises(UserError, match="no document falls into the train part"):
        train(config(train_store, tmp_path / "none", split=Split(train=0.0, validation=0.5, test=0.5)))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.tex, not a run of ours"):
        train(config(train_store, tmp_path / "else"))
    with pytest.raises(UserError, match="cannot be created"):
        train(config(train_store, Path("/proc/nothing/here")))
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_finite_are_named(train_store, tiny_subject, ray_local, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dmm_ray.activations.extract import ExtractConfig, extract

    model = AutoModelForCausalLM.from_pretrained(tiny_subject)
    tokenizer = AutoTokenizer.from_pretrained(tiny_subject)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(" dog").input_ids[-1]] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat sat on the mat"}\n' * 20 + '{"text": "the cat saw a dog"}\n' * 20)
    store = extract(
        ExtractConfig(model=str(tmp_path / "model"), text=str(text), layers=[1], out=str(tmp_path / "store"))
    )
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"not finite at document \d+, position \d+"):
            train(config(store, tmp_path / f"out{workers}", layer=1, workers=workers, cpus_per_worker=1))


def test_a_diverging_run_stops(train_store, tmp_path):
    with pytest.raises(CheckFailed, match=r"the loss is .* between samples"):
        train(config(train_store, tmp_path / "nan", lr=1e30, clip=1e30))


def test_presets():
    assert preset_shape("glp-d6", 2048) == (4096, 8192, 6)
    assert preset_shape("auto", 64) == (256, 512, 6)
    assert preset_shape("auto", 2048) == (4096, 8192, 6)
