import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from stores import extract_here

from dmm_ray import ActivationPrior, ActivationStore
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.failures import Failure, WorkerError
from dmm_ray.files import write_json
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.normalizer import variance_floor
from dmm_ray.ray_session import call_on_workers
from dmm_ray.store.split import TEST, TRAIN, Split
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.training import checkpoint, ray_trainer
from dmm_ray.training.calibrate import calibrate_prior_on_store
from dmm_ray.training.config import TrainConfig, preset_shape
from dmm_ray.training.loader import Loader
from dmm_ray.training.loop import Trainer
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.signals import RunSignal
from dmm_ray.training.state import snapshot
from dmm_ray.training.step import FlowBatch
from dmm_ray.training.train import train
from dmm_ray.units.lock import writer_lock


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
        "precision": "float32",
        "log_every": 512,
        "checkpoint_every": 6 * 256,
        "shuffle_rows": 2000,
        "calibration_rows": 0,
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
    manifest = ActivationStore.open(train_store).manifest
    assert prior.config.training["window"] == manifest.window
    assert TokenSelection.model_validate(prior.config.training["kept"]) == manifest.kept
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


def test_a_finished_prior_has_percentiles(train_store, tmp_path):
    """Not without validation rows."""
    short = {"samples": 256, "calibration_rows": 64}
    rows = ActivationStore.open(train_store).select(2, Split(seed=1), TEST).activation[:4].float()
    out = train(config(train_store, tmp_path / "with", **short))
    percentile = ActivationPrior.from_pretrained(out).log_prob(rows, steps=2, probes=1).percentile
    assert percentile is not None
    assert percentile.shape == (4,)
    out = train(
        config(train_store, tmp_path / "none", **short, split=Split(train=0.9, validation=0, test=0.1))
    )
    assert ActivationPrior.from_pretrained(out).log_prob(rows, steps=2, probes=1).percentile is None


def test_calibration_on_a_worker_s_resources_raises_what_went_wrong(ray_local, train_store, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        call_on_workers(1, calibrate_prior_on_store, str(tmp_path / "none"), train_store, cpus=1, gpus=0)


def test_a_finished_run_returns_at_once(finished, train_store):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert train(config(train_store, finished)) == str(finished)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_is_refused_by_field(finished, train_store):
    with pytest.raises(UserError, match=r"^lr: .* was made with 0\.003, not 0\.001; choose another --out"):
        train(config(train_store, finished, lr=1e-3))


def test_ray_workers_see_the_same_samples(finished, train_store, ray_local, tmp_path):
    two = train(config(train_store, tmp_path / "two", workers=2, cpus_per_worker=1, parallel="fsdp"))
    for a, b in zip(curve(two), curve(finished), strict=True):
        assert a[:2] == pytest.approx(b[:2], rel=1e-4)


def test_only_training_documents_are_read(train_store):
    store, split = ActivationStore.open(train_store), Split(seed=1)
    loader = Loader(store, 2, split, window_rows=1500, seed=0)
    rows = store.select(2, split, TRAIN).activation
    assert loader.order.epoch_rows == len(rows)
    n = len(rows) // 4
    batches = loader.batches(0, n, slice(0, n))
    seen = torch.cat([next(batches).clone() for _ in range(4)])
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

    model = AutoModelForCausalLM.from_pretrained(tiny_subject)
    tokenizer = AutoTokenizer.from_pretrained(tiny_subject)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(" dog").input_ids[-1]] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat sat on the mat"}\n' * 20 + '{"text": "the cat saw a dog"}\n' * 20)
    store = extract_here(
        model=str(tmp_path / "model"), text=str(text), layers=[1], out=str(tmp_path / "store")
    )
    with pytest.raises(UserError, match=r"NaN or Inf at document \d+, position \d+"):
        train(config(store, tmp_path / "out", layer=1, workers=1, cpus_per_worker=1, batch=64))


def test_one_run_at_a_time_writes_a_folder(finished, train_store, tmp_path):
    """A folder that is held is refused; a lock that its killed holder left is taken over."""
    out = tmp_path / "held"
    out.mkdir()
    with (
        writer_lock(str(out)),
        pytest.raises(UserError, match=rf"out: {out} is being written by process {os.getpid()}; wait or"),
    ):
        train(config(train_store, out))
    assert list(out.iterdir()) == []
    (out / ".lock").write_text("4711")
    train(config(train_store, out))
    assert curve(out) == curve(finished)
    assert not (out / ".lock").exists()


def test_more_workers_than_the_cluster_has_room_for_are_refused(train_store, ray_local, tmp_path):
    for changes, said in (
        ({"workers": 5, "cpus_per_worker": 1}, "workers: 5 x 1 CPU is more than the cluster's 4;"),
        ({"workers": 9, "min_workers": 3, "cpus_per_worker": 2}, "workers: 3 x 2 CPU is more than"),
        (
            {"workers": 1, "device": "cuda"},
            "workers: 1 x 1 GPU is more than the cluster's 0; lower --workers$",
        ),
    ):
        with pytest.raises(UserError, match=said):
            train(config(train_store, tmp_path / "out", **changes))


def test_workers_that_must_wait_are_said(ray_local, caplog, monkeypatch):
    import ray

    @ray.remote(num_cpus=3)
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    with caplog.at_level("WARNING"):
        this = TrainConfig(activations="a", out="b", workers=4, min_workers=2, cpus_per_worker=1)
        assert ray_trainer.worker_needs(this) == {"CPU": 1}
        ray_trainer.warn_of_waiting(this, {"CPU": 1})
    assert "workers: 2 x 1 CPU needed, but only 1 of the cluster's 4 are free: the run waits" in caplog.text
    ray.kill(holder)


def test_workers_that_do_not_come_are_said(tmp_path, ray_local, caplog, monkeypatch):
    monkeypatch.setattr(ray_trainer, "WAIT_S", 0.0)
    waiting = ray_trainer.Waiting(str(tmp_path), {"CPU": 1})
    waiting.look()
    assert "no workers for 0 s: each needs 1 CPU on one node, free in the whole cluster are" in caplog.text
    caplog.clear()
    write_json(str(tmp_path / ".ray" / "started.json"), {})
    waiting.look()
    assert caplog.text == ""


def test_a_store_of_another_width_or_layer_is_refused_on_resume(finished, train_store, tmp_path):
    out = tmp_path / "other"
    shutil.copytree(finished, out)
    with pytest.raises(UserError, match=r"^layer: .* was made with 2, not 1; choose another --out"):
        train(config(train_store, out, layer=1))
    saved = json.loads((out / "train.json").read_text())
    saved["prior"]["d"] = 64
    (out / "train.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"^d: .* was made with 64, not 32; choose another --out"):
        train(config(train_store, out))


def test_fewer_rows_than_a_batch_are_refused(train_store, tmp_path):
    with pytest.raises(UserError, match=r"batch: 100000 samples, but layer 2 of .* has \d+ training rows"):
        train(config(train_store, tmp_path / "out", batch=100_000, levels_per_batch=100))


def new_run(config: TrainConfig, store: str) -> Trainer:
    return Trainer(config, prior_config(config, store), RankInfo(0, 1, torch.device("cpu")))


def prior_config(config: TrainConfig, store: str) -> PriorConfig:
    floor = variance_floor(torch.from_numpy(ActivationStore.open(store).statistics(2).var))
    return PriorConfig(d=32, layers=(2,), **config.network.shape(32)._asdict(), variance_floor=floor)


def test_saved_after_40_batches_the_next_8_are_bit_equal(train_store, tmp_path):
    changes = {"samples": 48 * 256, "log_every": 256, "checkpoint_every": 10**9}
    whole = new_run(config(train_store, tmp_path / "whole", **changes), train_store)
    assert whole.train(lambda _: RunSignal.CONTINUE)
    parts = config(train_store, tmp_path / "parts", **changes)
    assert not new_run(parts, train_store).train(
        lambda done: RunSignal.STOP if done == 40 else RunSignal.CONTINUE
    )
    rest = new_run(parts, train_store)
    assert rest.batch == len(curve(parts.out)) == 40
    assert rest.train(lambda _: RunSignal.CONTINUE)
    assert curve(parts.out) == curve(whole.config.out)
    states = [snapshot(run.denoiser, run.optimizer, run.ema) for run in (rest, whole)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_checkpoint_on_notice_changes_nothing(finished, train_store, tmp_path):
    run = new_run(config(train_store, tmp_path / "saved"), train_store)
    assert run.train(lambda done: RunSignal.CHECKPOINT if done % 5 == 0 else RunSignal.CONTINUE)
    assert curve(tmp_path / "saved") == curve(finished)
    assert checkpoint.complete(str(tmp_path / "saved")) == [18 * 256, 20 * 256]


def at_batch(
    monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let ``change`` see the losses of the ``number``-th batch from now on (from 0), and give others."""
    calls, loss = itertools.count(), FlowBatch.loss

    def changed(self: FlowBatch, *args: Any) -> torch.Tensor:
        losses = loss(self, *args)
        return change(losses) if next(calls) == number else losses

    monkeypatch.setattr(FlowBatch, "loss", changed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_a_second_interrupts_at_once(train_store, tmp_path, monkeypatch, number):
    out, numbers = tmp_path / "out", (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(s) for s in numbers]
    for send in ([number], [number, number]):
        with monkeypatch.context() as patch:
            at_batch(patch, 2, lambda losses, send=send: [signal.raise_signal(s) for s in send] and losses)
            with pytest.raises(KeyboardInterrupt):
                train(config(train_store, out))
        assert checkpoint.complete(str(out)) == [3 * 256]
        assert [signal.getsignal(s) for s in numbers] == before


def test_one_bad_row_is_named_and_never_saved(train_store, tmp_path, monkeypatch):
    """Row 100 of batch 7 has a loss that is not finite; batch 8 would be saved, the interval ends much later."""
    out = tmp_path / "nan"
    at_batch(monkeypatch, 7, lambda losses: losses.index_fill(0, torch.tensor([100]), torch.nan))
    with pytest.raises(CheckFailed, match=r"the loss is nan between samples 1892 and 1893; lower --lr"):
        train(config(train_store, out, checkpoint_every=2 * 256, log_every=24 * 256))
    assert checkpoint.complete(str(out)) == [4 * 256, 6 * 256]


def test_a_learning_rate_far_too_high_stops(train_store, tmp_path):
    with pytest.raises(CheckFailed, match=r"the (loss|gradient's norm) is .* between samples"):
        train(config(train_store, tmp_path / "nan", lr=1e30, clip=1e30))


def test_what_ray_s_workers_raise_is_one_line_with_its_rank(ray_local, train_store, tmp_path):
    """A shard that cannot be read; the trace lies in the folder until the same command has finished the run."""
    store = Path(shutil.copytree(train_store, tmp_path / "store"))
    shard = store / "layer_02" / "shard-000001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + bytes(8))
    this = config(str(store), tmp_path / "out", samples=512, workers=1, cpus_per_worker=1, max_failures=0)
    log = tmp_path / "out" / "errors" / "rank-0.log"
    with pytest.raises(CheckFailed) as failed:
        train(this)
    says = str(failed.value)
    assert re.fullmatch(
        rf"training failed: rank 0: {shard}: ArrowInvalid: .*footer.*; full trace: {log}", says
    )
    assert "in _open" in log.read_text()
    shard.write_bytes(whole)
    train(config(str(store), tmp_path / "out", samples=512))
    assert not log.parent.exists()


def test_the_worker_at_fault_is_named_not_those_that_lost_it(train_store, tmp_path):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6781")
    this, killed = config(train_store, tmp_path), ActorDiedError()
    at_fault = {
        "rank 2: KeyError: 'a'": WorkerError(*Failure.of(KeyError("a"))),
        "rank 2: a worker process died (ActorDiedError), most likely killed because memory ran out; lower "
        "--micro-batch or use machines with more memory": WorkerHealthCheckFailedError("no answer", killed),
        "rank 2: OutOfMemoryError: CUDA out of memory; lower --micro-batch or use a GPU with more memory":
            WorkerError(*Failure.of(torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch")),
    }  # fmt: skip
    for says, error in at_fault.items():
        group = WorkerGroupError("page after page", {0: WorkerError(*Failure.of(lost)), 2: error})
        line = f"training failed after 3 restarts: {says}; full trace: {tmp_path}/errors/rank-2.log"
        assert ray_trainer._failure(this, group) == line
    controller = ControllerError(ValueError("no workers"))
    assert ray_trainer._failure(this, controller).startswith("training failed: ValueError: no workers; full")


def test_checkpoints_kept_for_ever_outlive_the_run(train_store, tmp_path):
    out = tmp_path / "kept"
    train(config(train_store, out, checkpoint_every=3 * 256, keep_every=9 * 256, keep_best=True))
    kept = checkpoint.complete(str(out))
    assert {9 * 256, 18 * 256} <= set(kept) <= {9 * 256, 18 * 256, 21 * 256}


def test_presets():
    assert preset_shape("glp-d6", 2048) == (4096, 8192, 6)
    assert preset_shape("auto", 64) == (256, 512, 6)
    assert preset_shape("auto", 2048) == (4096, 8192, 6)
