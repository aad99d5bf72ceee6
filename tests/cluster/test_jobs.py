"""``ray job submit`` of extraction and training against a cluster started by hand."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from dmm_ray import ActivationPrior, ActivationStore

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell next to ``ray start --head`` with token authentication on."""
    folder = Path(tmp_path_factory.mktemp("ray", numbered=True))
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard, client, agent = free_ports(4)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--object-store-memory=268435456", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", head, folder / "head.log")
        yield env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    transport = httpx.HTTPTransport(retries=0)
    with httpx.Client(transport=transport, timeout=5) as client:
        for _ in range(100_000):
            assert process.poll() is None, log.read_text()
            try:
                if client.get(url).status_code in (200, 401, 403):
                    return
            except httpx.TransportError:
                os.sched_yield()
    raise AssertionError(log.read_text())


def submit(env: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    args = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, *command]
    return subprocess.run(args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_extract_then_train_as_jobs(cluster, tiny_subject, tiny_text, tmp_path):
    store, prior = tmp_path / "store", tmp_path / "prior"
    done = submit(
        cluster, "jobs/extract.py", "--config", "jobs/configs/extract_demo.yaml",
        "--model", str(tiny_subject), "--text", str(tiny_text), "--layers", "[2]", "--out", str(store),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(store) in done.stdout
    assert ActivationStore.open(str(store)).rows > 500
    done = submit(
        cluster, "jobs/train.py", "--config", "jobs/configs/train_demo.yaml", "--wandb", "disabled",
        "--activations", str(store), "--out", str(prior), "--samples", "4096", "--batch", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    trained = ActivationPrior.from_pretrained(str(prior))
    assert trained.d == 32
    assert trained.calibration is not None
    records = [json.loads(line) for line in (prior / "stats.jsonl").read_text().splitlines()]
    assert records[-1]["samples"] == 4096
    failed = submit(
        cluster, "jobs/train.py", "--activations", str(tmp_path / "none"), "--out", str(tmp_path / "x")
    )
    assert failed.returncode != 0
    assert "not an activation store" in failed.stdout + failed.stderr
