"""Environments in which Ray cannot work end in one line, soon, with exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmm_ray import ray_session
from dmm_ray.errors import UserError
from dmm_ray.ray_session import check_cluster, cluster_address
from dmm_ray.units.resources import ActorPool, plan_resources


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where something listens that is not Ray and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def dmm(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dmm_ray", *args],
        env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line that is an error; log lines of ours may stand before it."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert all(word in last for word in words), last
    assert not [line for line in before if "Traceback" in line or "gcs" in line], done.stderr


@pytest.mark.parametrize(
    ("value", "found"), [(None, None), ("", None), ("local", None), ("auto", "auto"), (" h:1 ", "h:1")]
)
def test_which_cluster(value: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == found


def test_a_cluster_that_is_gone(closed: str, tiny_subject: Path, tiny_text: Path, tmp_path: Path) -> None:
    asked = ("extract", "--model", str(tiny_subject), "--text", str(tiny_text), "--layers", "[1]")
    done = dmm(*asked, "--out", str(tmp_path / "out"), RAY_ADDRESS=closed)
    refused(done, f"RAY_ADDRESS: no Ray cluster at {closed}", "unset RAY_ADDRESS")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_not_a_cluster(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "ANSWER_S", 2.0)
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS: no Ray cluster answers at {silent} within 2 s"):
        check_cluster(silent)
    with pytest.raises(UserError, match=r"is for `ray job submit`; set it to the head's host:port"):
        check_cluster("http://127.0.0.1:8265")
    with pytest.raises(UserError, match=r"no Ray cluster at nowhere\.invalid:6379"):
        check_cluster("nowhere.invalid:6379")


def test_a_folder_for_sockets_that_is_too_long(tiny_subject: Path, tiny_text: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 110)
    long.mkdir()
    asked = ("extract", "--model", str(tiny_subject), "--text", str(tiny_text), "--layers", "[1]")
    done = dmm(*asked, "--out", str(tmp_path / "out"), TMPDIR=str(long), RAY_ADDRESS="")
    refused(done, "TMPDIR: too long a path for the sockets", "set RAY_TMPDIR to a short one")


def test_local_is_this_machine_and_asks_for_no_more_than_it_has(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(UserError, match=r"^cpus_per_actor: 1000 is more than the 4 available to Ray here"):
        plan_resources(ActorPool(cpus_per_actor=1000), 1)
