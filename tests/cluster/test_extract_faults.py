"""Extraction jobs that are killed, interrupted, robbed of actors, nodes and disk: the store comes out the same."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from extractions import (
    ALONE,
    BY_LINE,
    Job,
    Run,
    content,
    extraction_actors,
    left_over,
    stamps,
    units_of,
    write_text,
)
from stores import extract_here

from dmm_ray.ray_session import quiet

pytestmark = [pytest.mark.fault, pytest.mark.slow]
TRIALS = int(os.environ.get("DMM_CHAOS_TRIALS", "1"))
"""How often the stopped jobs are stopped."""
STOPS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
UNITS = 48
OPTIONS = {"layers": [1, 2], "dtype": "float32", "rows_per_shard": 1260, "actors": 1, "cpus_per_actor": 1}
NODE = {"num_cpus": 1, "object_store_memory": 256 << 20}


@pytest.fixture(scope="module")
def job(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """48 units of 20 documents, on a Ray of its own."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "logs").mkdir()
    return Job(tiny_subject, write_text(folder / "t.jsonl", 20 * UNITS), folder / "logs", OPTIONS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray that outlives the jobs: one node of one CPU. The loss of another would be noticed soon."""
    quiet()
    from ray.cluster_utils import Cluster

    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {**NODE, "include_dashboard": False, "_system_config": soon}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield found
    finally:
        found.shutdown()


@pytest.fixture(scope="module")
def shared(job: Job, cluster: Any) -> Job:
    """The same on the cluster."""
    return replace(job, env={"RAY_ADDRESS": cluster.address})


@pytest.fixture(scope="module")
def alone(job: Job) -> Job:
    """The same without Ray, where what it does is not about Ray; `make chaos` has Ray there too."""
    return replace(job, command=ALONE) if TRIALS == 1 else job


@pytest.fixture(scope="module")
def reference(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the undisturbed work leaves."""
    store = tmp_path_factory.mktemp("reference") / "store"
    extract_here(model=str(job.model), text=str(job.text), out=str(store), **job.options)
    assert len(units_of(store)) == UNITS
    return content(store)


def watch(run: Run, store: Path, more: int) -> None:
    """Until ``more`` further units are finished, or all."""
    wanted = min(UNITS, len(units_of(store)) + more)
    run.until(lambda: len(units_of(store)) >= wanted)


def wait_a_moment(draw: random.Random) -> None:
    """The random moment of a fault: up to a unit's length after a record."""
    threading.Event().wait(draw.uniform(0, 0.05))


def same(store: Path, reference: dict[str, bytes]) -> bool:
    """Whether a finished store has the bytes of ``reference`` and nothing besides."""
    assert left_over(store) == []
    return content(store) == reference


def untouched(before: dict[str, tuple[int, int]], store: Path) -> bool:
    """Whether the files of units that were finished are the same ones still."""
    after = stamps(store)
    return all(after[name] == stamp for name, stamp in before.items())


def stop(run: Run, how: signal.Signals) -> None:
    """Send a signal as `kill` does, or to the whole group as Ctrl-C does; see that nothing is left that can write.

    Two agents of Ray live on for a minute after a SIGKILL, trying to reach what is gone.
    """
    children = [child for child in run.children() if not child.name().endswith("Agent")]
    children += extraction_actors(psutil.Process())
    if how == signal.SIGINT:
        os.killpg(run.process.pid, how)
    else:
        run.process.send_signal(how)
    code = run.end()
    if how == signal.SIGKILL:
        assert code == -how
    else:
        assert code == 130
        assert run.log.endswith("dmm extract: interrupted; the same command resumes\n")
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_stopped_again_and_again(
    job: Job, shared: Job, alone: Job, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """A SIGTERM while Ray starts, then SIGKILL, Ctrl-C, SIGTERM and so on after some units, by turns with a Ray that
    ends with the job and one that stays."""
    store, draw, before = tmp_path / "store", random.Random(1), dict[str, tuple[int, int]]()
    run = job.start(store)
    run.until((store / "manifest.json").exists)
    stop(run, signal.SIGTERM)
    for _, how, what in zip(
        range(TRIALS), itertools.cycle(STOPS), itertools.cycle((job, shared)), strict=False
    ):
        run = what.start(store)
        run.until(lambda run=run: "plan:" in run.log)  # before that, Python itself is starting
        watch(run, store, draw.randint(0, UNITS // TRIALS - 1))
        wait_a_moment(draw)
        stop(run, how)
        assert untouched(before, store)
        before = stamps(store)
    units = len(units_of(store))
    (store / "layer_01" / "shard-000002.parquet.tmp-0123abcd").write_bytes(b"of another process")
    log = alone.start(store).finish()
    assert f"resuming {store}: {units} of {UNITS} units are done" in log
    assert untouched(before, store)
    assert same(store, reference)


def test_robbed_of_actors_and_of_a_node_and_a_second_job_refused(
    shared: Job, reference: dict[str, bytes], cluster: Any, tmp_path: Path
) -> None:
    """What is lost is started again, on the other node when there is room, and does what it was doing."""
    store, draw, kills = tmp_path / "store", random.Random(2), max(1, TRIALS // 2)
    node = cluster.add_node(**NODE)
    [raylet] = node.all_processes["raylet"]
    there = psutil.Process(raylet.process.pid)
    run = shared.start(store, actors=2)
    run.until((store / ".lock").exists)
    second = shared.start(store)
    run.until(lambda: bool(extraction_actors(there)))
    for _ in range(kills):
        watch(run, store, draw.randint(1, UNITS // (4 * kills)))
        wait_a_moment(draw)
        actors = extraction_actors(psutil.Process())
        actors[0].kill()
    before = stamps(store)
    cluster.remove_node(node, allow_graceful=False)
    assert len(units_of(store)) < UNITS
    assert second.end() == 2
    assert second.log.splitlines()[1:] == [
        f"dmm extract: out: {store} is being written by process {run.process.pid}; wait or choose another --out"
    ]
    run.finish()
    assert untouched(before, store)
    assert same(store, reference)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    """A folder with small file systems, seen through the process whose mount namespace has them."""
    sizes = {"small": "2m", "large": "16m"}
    for name in sizes:
        (tmp_path / name).mkdir()
    mounts = [f"mount -t tmpfs -o size={size} tmpfs {tmp_path / name}" for name, size in sizes.items()]
    holder = subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", " && ".join([*mounts, "echo ready", "read end"])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if (said := holder.stdout.readline()) != "ready\n":
            pytest.skip(f"no mount namespace here: {said}")
        yield Path(f"/proc/{holder.pid}/root{tmp_path}")
        holder.stdin.close()


def test_disk_full(alone: Job, reference: dict[str, bytes], disks: Path) -> None:
    store, filler = disks / "large" / "store", disks / "large" / "filler"
    stepwise = replace(alone, env={BY_LINE: "1"}) if TRIALS == 1 else alone
    refused, run = alone.start(disks / "small" / "store"), stepwise.start(store)
    assert refused.end() == 2
    says = r"store needs about 0\.006\d+ GB more and its disk has 0\.0021 GB free; choose another --out, fewer layers"
    assert re.search(f"out: {disks}/small/{says}", refused.log.splitlines()[-1])
    assert list((disks / "small").iterdir()) == []
    if TRIALS == 1:
        run.go_on(2)
    watch(run, store, 2)
    fill(filler)
    if TRIALS == 1:
        run.go_on(UNITS)
    assert run.end() == 2
    remedy = "the disk is full; free some space and run the same command again"
    assert run.log.splitlines()[-1] == f"dmm extract: out: {store}: {remedy}"
    before = stamps(store)
    assert 0 < len(units_of(store)) < UNITS
    assert left_over(store) == []
    filler.unlink()
    alone.start(store).finish()
    assert untouched(before, store)
    assert same(store, reference)


def fill(filler: Path) -> None:
    """Write until the disk is full."""
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
