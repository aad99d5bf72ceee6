from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import forbidding_s3, s3_server

from dmm_ray import files
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.units import lock as lock_module
from dmm_ray.units.lock import writer_lock

FOREIGN = {"token": "f" * 32, "host": "far", "pid": 77, "when": "then"}


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder on a filesystem without kernel locks; periods shrunk."""
    for name in ("BEAT_S", "LOST_S", "WATCH_S", "SETTLE_S"):
        monkeypatch.setattr(lock_module, name, getattr(lock_module, name) / 25)
    return f"memory://{tmp_path.name}"


def record(far: str) -> dict[str, object]:
    return files.read_json(files.join(far, ".lock"))


def put(far: str, **changes: object) -> None:
    files.write_bytes(files.join(far, ".lock"), json.dumps(FOREIGN | changes).encode())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def other_writer(far: str) -> Iterator[None]:
    """A holder elsewhere that renews its record."""
    stop = threading.Event()

    def beat() -> None:
        n = 0
        while not stop.wait(lock_module.BEAT_S):
            put(far, when=str(n := n + 1))

    put(far)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_local_second_writer_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as other:
        other.write("4321")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by process 4321"), writer_lock(str(tmp_path)):
            pass
        assert (tmp_path / ".lock").exists()
    with writer_lock(str(tmp_path)) as lock:  # a lock file whose holder is gone does not count
        lock.check()
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / ".lock").exists()


def test_held_renewed_released(far: str) -> None:
    with writer_lock(far) as lock:
        first = record(far)
        assert first["pid"] == os.getpid()
        until(lambda: record(far) != first)
        lock.check()
        assert record(far)["token"] == first["token"]
    assert not files.exists(files.join(far, ".lock"))


def test_second_writer_is_refused(far: str) -> None:
    with writer_lock(far) as lock:
        with pytest.raises(UserError, match=f"by process {os.getpid()} on "), writer_lock(far):
            pass
        lock.check()
        assert record(far)["pid"] == os.getpid()


@pytest.mark.usefixtures("other_writer")
def test_a_living_holder_elsewhere_is_named(far: str) -> None:
    message = f"^out: {far} is being written by process 77 on far; wait or choose another --out"
    with pytest.raises(UserError, match=message), writer_lock(far):
        pass
    assert record(far)["token"] == FOREIGN["token"]


@pytest.mark.parametrize("content", [json.dumps(FOREIGN), "half a rec", ""])
def test_a_stale_record_is_taken_over(far: str, content: str, caplog: pytest.LogCaptureFixture) -> None:
    files.write_bytes(files.join(far, ".lock"), content.encode())
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), writer_lock(far):
        assert time.monotonic() - started > lock_module.WATCH_S
        assert record(far)["pid"] == os.getpid()
    owner = "process 77 on far" if "far" in content else "another process"
    assert f"{owner} has stopped; its lock is taken over" in caplog.text


def test_a_record_that_goes_away_while_watched(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "WATCH_S", 60.0)
    put(far)
    remover = threading.Timer(
        0.1, lambda: files.filesystem(far)[0].rm_file(f"{files.filesystem(far)[1]}/.lock")
    )
    remover.start()
    with writer_lock(far):
        remover.join()
        assert record(far)["pid"] == os.getpid()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_holds(far: str, stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.5)
    if stale:
        put(far)
    done = threading.Event()

    def start(_: int) -> bool:
        try:
            with writer_lock(far) as lock:
                while not done.wait(lock_module.BEAT_S):
                    lock.check()
                return True
        except (UserError, CheckFailed):
            return False

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(start, i) for i in range(6)]
        until(lambda: sum(f.done() for f in running) == 5)
        done.set()
        assert sum(f.result() for f in running) == 1


def test_a_holder_that_lost_its_record_stops(far: str) -> None:
    with writer_lock(far) as lock:
        put(far)
        message = f"{far} was taken over by process 77 on far"
        until(lambda: not any(t.name == "lock heartbeat" for t in threading.enumerate()))
        with pytest.raises(CheckFailed, match=message):
            lock.check()
    assert record(far) == FOREIGN  # not ours to delete


def test_a_holder_that_slept_looks_before_it_goes_on(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 60.0)  # the thread does nothing
    with writer_lock(far) as lock:
        first = record(far)
        until(lambda: lock.check() or record(far) != first)  # renewed by check() once LOST_S have passed
        put(far)
        lock.check()  # renewed just now: nothing to find out yet
        time.sleep(lock_module.LOST_S)
        with pytest.raises(CheckFailed, match="taken over by process 77 on far"):
            lock.check()


def test_a_deleted_record_is_put_back(far: str) -> None:
    fs, path = files.filesystem(far)
    with writer_lock(far) as lock:
        fs.rm_file(f"{path}/.lock")
        until(lambda: fs.exists(f"{path}/.lock"))
        lock.check()


@pytest.mark.usefixtures("far")
def test_a_store_that_cannot_be_reached(caplog: pytest.LogCaptureFixture) -> None:
    with s3_server() as bucket:
        far = f"{bucket}/store"
        with writer_lock(far) as lock:
            first = record(far)
            with forbidding_s3():
                until(lambda: "the lock was not renewed: s3://bucket/store/.lock: " in caplog.text)
                time.sleep(lock_module.LOST_S)
                with pytest.raises(
                    CheckFailed, match=r"cannot be renewed \(s3://bucket/store/.lock: .*same command"
                ):
                    lock.check()
            lock.check()  # it was ours all the time
            until(lambda: record(far)["when"] != first["when"])
            with pytest.raises(UserError, match=f"by process {os.getpid()} on "), writer_lock(far):
                pass
        assert not files.exists(f"{far}/.lock")


def test_where_nothing_can_be_written() -> None:
    message = r"^s3://b/store/\.lock: (Access Denied|Forbidden); check"
    with forbidding_s3(), pytest.raises(UserError, match=message), writer_lock("s3://b/store"):
        pass
