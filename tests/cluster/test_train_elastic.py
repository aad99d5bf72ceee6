"""A run over two Ray nodes that loses one and gets it back: fewer workers, then as many again, the same loss curve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import extract_here
from texts import make_texts

from dmm_ray.prior.config import PriorConfig
from dmm_ray.ray_session import quiet
from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.loop import Trainer
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.signals import RunSignal

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        "DMM_CHAOS_TRIALS" not in os.environ,
        reason="three starts of a worker group, minutes long: `make chaos` runs it; test_train and test_parallel are "
        "its short forms",
    ),
]
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}
"""The loss of a node is noticed in two seconds."""
BATCH, LIMIT_S = 64, 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of one node of one CPU, which this process is not connected to."""
    quiet()
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": SOON}
    )
    try:
        yield found
    finally:
        found.shutdown()


def environment(cluster: Any) -> dict[str, str]:
    return os.environ | {
        "RAY_ADDRESS": cluster.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def store(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """About 3,000 rows of the tiny subject."""
    folder = tmp_path_factory.mktemp("store")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(150, seed=2)))
    return extract_here(model=str(tiny_subject), text=str(text), layers=[2], out=str(folder / "store"))


def config(store: str, out: Path) -> TrainConfig:
    return TrainConfig(
        activations=store,
        out=str(out),
        samples=100_000 * BATCH,
        batch=BATCH,
        levels_per_batch=16,
        d_model=32,
        d_mlp=64,
        n_blocks=2,
        precision="float32",
        warmup=0.0,
        lr=1e-3,  # the default for so small a network is large enough to amplify rounding
        workers=2,
        min_workers=1,
        resize_interval_s=1.0,
        parallel="fsdp",
        cpus_per_worker=1,
        log_every=2 * BATCH,
        checkpoint_every=4 * BATCH,
    )


def records(out: Path) -> list[dict[str, Any]]:
    stats = out / "stats.jsonl"
    return [json.loads(line) for line in stats.read_text().splitlines()] if stats.exists() else []


def watch(process: subprocess.Popen[str], log: Path, condition: Callable[[], bool]) -> None:
    """Until ``condition`` holds, while the command is running."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def undisturbed(this: TrainConfig, out: Path, n: int) -> list[dict[str, Any]]:
    """The first ``n`` records of the same run by one worker in this process."""
    prior = PriorConfig.model_validate(json.loads(Path(this.out, "train.json").read_text())["prior"])
    alone = this.model_copy(
        update={"out": str(out), "workers": 0, "parallel": "ddp", "checkpoint_every": this.schedule.samples}
    )
    run = Trainer(alone, prior, RankInfo(0, 1, torch.device("cpu")))
    assert not run.train(lambda done: RunSignal.STOP if done == 2 * n else RunSignal.CONTINUE)
    return records(out)


def test_a_node_is_lost_and_comes_back(cluster: Any, store: str, tmp_path: Path) -> None:
    this = config(store, tmp_path / "prior")
    out, log, file = Path(this.out), tmp_path / "log", tmp_path / "config.json"
    file.write_text(this.model_dump_json())
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()

    def last(workers: int, more: int) -> bool:
        """Whether the newest record is of so many workers, and ``more`` others are."""
        found = [r["workers"] for r in records(out)]
        return len(found) > more and found[-more:] == [workers] * more

    with log.open("w") as f:
        process = subprocess.Popen(
            [sys.executable, "-m", "dmm_ray", "train", "--config", str(file)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=f, text=True, env=environment(cluster),
        )  # fmt: skip
    watch(process, log, lambda: last(2, 20))
    cluster.remove_node(second, allow_graceful=False)
    watch(process, log, lambda: last(1, 20))
    cluster.add_node(**NODE)
    watch(process, log, lambda: last(2, 20))
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 130, log.read_text()

    assert "they take all 2 CPUs of the cluster" in log.read_text()
    assert "interrupted: saving a checkpoint" in log.read_text()
    assert not (out / ".ray").exists()
    seen = records(out)
    assert [r["samples"] for r in seen] == [2 * BATCH * (i + 1) for i in range(len(seen))]
    phases = [workers for workers, _ in groupby(r["workers"] for r in seen)]
    # On a busy machine it begins with the worker that is there first.
    assert phases in ([2, 1, 2], [1, 2, 1, 2])
    saved = checkpoint.newest(this.out)
    assert saved is not None
    assert saved > seen[-1]["samples"] - 2 * BATCH
    for mine, whole in zip(seen, undisturbed(this, tmp_path / "undisturbed", len(seen)), strict=True):
        for name in ("samples", "lr", "loss", "grad_norm"):
            assert mine[name] == pytest.approx(whole[name], rel=1e-3), mine["samples"]
