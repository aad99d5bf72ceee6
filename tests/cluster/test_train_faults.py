"""Training runs that are killed and interrupted: weights and loss curve come out the same, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from stores import extract_here
from texts import make_texts

from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train

Parallel = Literal["ddp", "fsdp"]
pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(600)]
TRIALS = int(os.environ.get("DMM_CHAOS_TRIALS", "1"))
"""Runs in one process that are killed; half as many on Ray, where there are more than two."""
ON_RAY: list[tuple[int, Parallel]] = [(1, "ddp"), (2, "fsdp"), (2, "ddp")]
"""Workers, and whether their weights are sharded, in turns."""
LOG, CHECKPOINT = 3, 20
"""Batches. Records and checkpoints do not fall together: an interval under way goes into the checkpoint."""
BATCHES, RAY_BATCHES = 600, 1200
"""Of a whole run. Workers whose driver is killed go on for some seconds, until Ray has noticed."""
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def store(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """About 6,000 rows of the tiny subject."""
    folder = tmp_path_factory.mktemp("store")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(300, seed=2)))
    return extract_here(model=str(tiny_subject), text=str(text), layers=[2], out=str(folder / "store"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the other processes have: another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(store: str, out: Path, workers: int, parallel: Parallel = "ddp") -> TrainConfig:
    return TrainConfig(
        activations=store,
        out=str(out),
        samples=(RAY_BATCHES if workers else BATCHES) * 64,
        batch=64,
        levels_per_batch=16,
        d_model=32,
        d_mlp=64,
        n_blocks=2,
        lr=3e-3,
        workers=workers,
        parallel=parallel,
        cpus_per_worker=1,
        log_every=LOG * 64,
        checkpoint_every=CHECKPOINT * 64,
        shuffle_rows=2000,
        calibration_rows=0,
    )


def content(out: Path) -> tuple[bytes, list[Any]]:
    """The prior's weights and every number of the loss curve that is not a time or a memory."""
    names = ("samples", "loss", "lr", "grad_norm", "validation_loss", "loss_by_level")
    return (out / "model.safetensors").read_bytes(), [[r[n] for n in names] for r in records(out)]


def records(out: Path) -> list[dict[str, Any]]:
    stats = out / "stats.jsonl"
    return [json.loads(line) for line in stats.read_text().splitlines()] if stats.exists() else []


def stamp(out: Path) -> int:
    stats = out / "stats.jsonl"
    return stats.stat().st_mtime_ns if stats.exists() else 0


@dataclass
class Command:
    """``dmm train`` in a process group of its own, as a terminal starts it."""

    process: subprocess.Popen[str]
    log: Path
    out: Path
    stamp: int
    """When the loss curve was last written before."""

    @classmethod
    def start(cls, config: TrainConfig) -> Command:
        """Start or resume."""
        out = Path(config.out)
        path, log = out.with_suffix(".json"), out.with_suffix(".log")
        path.write_text(config.model_dump_json())
        with log.open("w") as f:
            process = subprocess.Popen(
                [sys.executable, "-m", "dmm_ray", "train", "--config", str(path)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=f, text=True, process_group=0,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return cls(process, log, out, stamp(out))

    def until(self, condition: Callable[[], bool]) -> None:
        """Watch until ``condition`` holds, while the command is running."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def until_batch(self, batch: int) -> None:
        """Watch until this process has come so far."""
        self.until(lambda: stamp(self.out) > self.stamp and records(self.out)[-1]["samples"] >= batch * 64)

    def workers(self) -> list[psutil.Process]:
        """Its Ray Train workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    def stop(self, how: signal.Signals) -> None:
        """Send a signal, to the whole group if it is Ctrl-C; see that nothing is left that can write."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        if how == signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        code = self.process.wait(LIMIT_S)
        assert code == (130 if how == signal.SIGINT else -how), self.log.read_text()
        writers = [child for child in children if not is_agent(child)]
        assert psutil.wait_procs(writers, timeout=60)[1] == []
        assert not (self.out / "summary.json").exists()


def is_agent(process: psutil.Process) -> bool:
    """Two agents of Ray live on for a minute after a SIGKILL; they write nothing of ours."""
    return not process.is_running() or process.name().endswith("Agent")


@pytest.fixture(scope="module")
def undisturbed(
    store: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[bytes, list[Any]]]:
    """What a run of so many workers leaves, each made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def make(workers: int, parallel: Parallel = "ddp") -> tuple[bytes, list[Any]]:
        return content(Path(train(config(store, folder / f"{parallel}-{workers}", workers, parallel))))

    return make


def interrupted(this: TrainConfig, before: int, draw: random.Random) -> int:
    """Resume a run and interrupt it; the samples of the checkpoint that it leaves."""
    run = Command.start(this)
    run.until_batch(before // 64 + draw.randrange(1, CHECKPOINT))
    run.stop(signal.SIGINT)
    assert "interrupted: saving a checkpoint" in run.log.read_text()
    assert f"resuming after {before} samples" in run.log.read_text()
    saved = checkpoint.newest(this.out)
    assert saved is not None
    assert saved > before
    assert records(run.out)[-1]["samples"] > saved - LOG * 64
    assert not (run.out / ".ray").exists()
    return saved


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_in_one_process(store, undisturbed, tmp_path, trial):
    draw, this = random.Random(trial), config(store, tmp_path / "prior", 0)
    for low in (1, BATCHES // 2):
        run = Command.start(this)
        run.until_batch(draw.randrange(low, low + BATCHES // 3))
        run.stop(signal.SIGKILL)
    train(this)
    assert content(run.out) == undisturbed(0)


@pytest.mark.skipif(TRIALS == 1, reason="minutes long: `make chaos` runs it")
@pytest.mark.parametrize("trial", range(max(1, TRIALS // 2)))
def test_driver_and_worker_killed_on_ray(ray_local, store, undisturbed, tmp_path, trial):
    """The driver is killed, then interrupted, then one of its workers is killed, by the process number."""
    draw, (workers, parallel) = random.Random(trial), ON_RAY[trial % len(ON_RAY)]
    this = config(store, tmp_path / "prior", workers, parallel)
    run = Command.start(this)
    run.until_batch(draw.randrange(CHECKPOINT, RAY_BATCHES // 10))
    run.stop(signal.SIGKILL)

    saved = interrupted(this, checkpoint.complete(this.out)[-1], draw)

    run = Command.start(this)
    run.until_batch(min(RAY_BATCHES - 2 * CHECKPOINT, saved // 64 + draw.randrange(1, RAY_BATCHES // 5)))
    draw.choice(run.workers()).kill()
    assert run.process.wait(LIMIT_S) == 0, run.log.read_text()
    assert f"resuming after {saved} samples" in run.log.read_text()
    assert content(run.out) == undisturbed(workers, parallel)
