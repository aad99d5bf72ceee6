from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.serving import app
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.serve import _failure, running

DMM = [sys.executable, "-c", "from dmm_ray.cli import main; main()"]
DEADLINE_S = 120


def test_the_http_side_needs_no_torch() -> None:
    check = "import dmm_ray.serving.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_a_taken_port_is_named(single: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"{port}.*--port"),
            running(ServeConfig(prior=single, port=port)),
        ):
            pass


@pytest.mark.parametrize("name", ["missing/prior", "/missing", "empty"])
def test_a_folder_without_a_prior_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name), running(ServeConfig(prior=name, port=0)):
        pass


@pytest.mark.slow
def test_a_prior_that_does_not_load_says_why(
    ray_local: None, single: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = app._options
    once = {"max_constructor_retry_count": 1}  # of three, by default: each is a process that loads torch
    monkeypatch.setattr(app, "_options", lambda *args: options(*args) | once)
    (tmp_path / "config.json").write_bytes((Path(single) / "config.json").read_bytes())
    with (
        pytest.raises(
            UserError, match=rf"^{tmp_path}/model\.safetensors: no such file; copy the prior again$"
        ),
        running(ServeConfig(prior=str(tmp_path), port=0, cpus=0.5)),
    ):
        pass


def test_a_replica_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Serve says of its deployments is pages long."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    page = (
        "The deployment failed to start 3 times in a row. Error:\nray::ServeReplica (pid=3)\n  File 'a.py'\n"
    )
    for last, says in {
        "dmm_ray.errors.CheckFailed: the prior's answers contain NaN or Inf": r"CheckFailed: the prior's .* Inf; full",
        "torch.OutOfMemoryError: CUDA out of memory": r"OutOfMemoryError: CUDA out of memory; full trace",
    }.items():
        found = _failure(
            ["", f"{page}{last}\n"], RuntimeError("Deploying application dmm failed: see above.")
        )
        assert isinstance(found, CheckFailed)
        assert re.match(f"the application did not start: {says}", str(found))
        assert page in Path(str(found).rpartition("full trace: ")[2]).read_text()
    refused = f"{page}dmm_ray.errors.UserError: prior: no such layer\n"
    assert _failure([refused, ""], RuntimeError()).args == ("prior: no such layer",)
    assert "did not start: RuntimeError: no answer;" in str(_failure([""], RuntimeError("no\nanswer")))


@pytest.mark.slow
def test_the_verb_serves_until_a_signal_and_ends_what_it_began(single: str) -> None:
    """Behind HAProxy; Serve's own proxy, the default, is what all other tests have."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["DMM_SERVE_TOKENS"] = "word"
    command = [*DMM, "serve", "--prior", single, "--port", str(port), "--cpus", "0.5", "--proxy", "haproxy"]
    command += ["--limits.max-rows", "65536"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr
        assert any(f"ready: {url}" in line for line in process.stderr)
        ask = partial(httpx.post, f"{url}/v1/sample", json={"n": 2, "steps": 2}, timeout=60)
        assert ask().status_code == 401
        found = ask(headers={"Authorization": "Bearer word", "X-Request-ID": "mine-1"})
        assert (found.status_code, found.headers["X-Request-ID"]) == (200, "mine-1")
        large = httpx.post(
            f"{url}/v1/sample",
            json={"n": 1 << 16, "steps": 1},
            headers={"Authorization": "Bearer word"},
            timeout=60,
        )
        assert len(large.json()["activations"]) == 1 << 16  # 4 MiB and what is around them
        listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
        assert [c.laddr.ip for c in listening if c.laddr.port == port] == ["127.0.0.1"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines() == [single]
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


def test_haproxy_is_refused_where_serve_is_there_already(ray_local: None, single: str) -> None:
    import ray.serve  # noqa: F401

    config = ServeConfig(prior=single, port=0, proxy="haproxy")
    with pytest.raises(UserError, match=r"^proxy: .*RAY_SERVE_ENABLE_HA_PROXY=1"), running(config):
        pass
