"""One writer at a time in a folder: a kernel lock on local disks, a record with a heartbeat elsewhere."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Protocol

from pydantic import ValidationError

from dmm_ray.config import Config
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.files import filesystem, is_local, join, plain_errors, write_bytes

logger = logging.getLogger(__name__)
LOCK = ".lock"
BEAT_S = 5.0
"""A holder rewrites its record this often."""
LOST_S = 20.0
"""A holder whose heartbeat is overdue by this long checks that the record is still its own before it continues."""
WATCH_S = 30.0
"""A record that does not change for this long is stale. More than LOST_S."""
SETTLE_S = 2.0
"""After writing the first record, wait this long and read it again, for two that start at once."""


class WriterLock(Protocol):
    """What the one writer of a folder holds."""

    def check(self) -> None:
        """Raise CheckFailed if another writer has taken the folder over, or if that cannot be found out."""


@contextmanager
def writer_lock(uri: str) -> Iterator[WriterLock]:
    """Hold the folder ``uri`` for writing; call ``check()`` of what this yields between pieces of work.

    On a local disk a killed holder's lock is gone with it. Elsewhere its record is watched for ``WATCH_S`` seconds
    first, comparing contents only, never the clocks of two machines.

    Raises:
        UserError: another process holds it, the message names it; or nothing can be written there.
    """
    lock = KernelLock(uri) if is_local(uri) else HeartbeatLock(uri)
    try:
        lock.acquire()
        yield lock
    finally:
        lock.release()


class KernelLock:
    """``flock`` on ``.lock`` in a local folder: gone with the process that holds it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._path = os.path.join(filesystem(uri)[1], LOCK)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take it. Raises UserError naming the process that has it."""
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                owner = os.read(handle, 32).decode() or "unknown"
                os.close(handle)
                raise UserError(refusal(self.uri, f"process {owner}")) from e
            if os.path.exists(self._path) and os.path.samestat(os.fstat(handle), os.stat(self._path)):
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                self._handle = handle
            else:  # the holder unlinked this file between our open and our lock
                os.close(handle)

    def check(self) -> None:
        """Nothing: a kernel lock cannot be lost."""

    def release(self) -> None:
        """Give it back, if it was taken."""
        if self._handle is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._handle)


class Holder(Config):
    """Content of ``.lock``: who writes. Every heartbeat changes ``when``, which only people read."""

    token: str
    host: str
    pid: int
    when: str


class HeartbeatLock:
    """A ``.lock`` record on a filesystem without kernel locks, rewritten by a thread while it is held."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.path = join(uri, LOCK)
        self.token = uuid.uuid4().hex
        self._renewed: float | None = None
        self._taken_by: str | None = None
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)

    def acquire(self) -> None:
        """Take it: watch a record that is there, write our own, see that it stands.

        Raises:
            UserError: another writer's record changes or takes the place of ours, or the store fails.
        """
        if (found := self._read()) is not None:
            self._watch(found)
        self._write()
        time.sleep(SETTLE_S)
        if (found := self._read()) is None or not self._is_ours(found):
            raise UserError(refusal(self.uri, owner_of(found)))
        self._thread.start()

    def check(self) -> None:
        """Make sure that the record was renewed of late, by the heartbeat or here."""
        try:
            if self._taken_by is None and time.monotonic() - (self._renewed or 0.0) > LOST_S:
                self._renew()
        except UserError as e:
            raise CheckFailed(f"out: the lock cannot be renewed ({e}); run the same command again") from e
        if self._taken_by is not None:
            raise CheckFailed(f"out: {self.uri} was taken over by {self._taken_by}; this run has stopped")

    def release(self) -> None:
        """Stop the heartbeat; delete the record if it is ours."""
        if self._renewed is None:
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        fs, path = filesystem(self.path)
        try:
            found = self._read()
            if found is not None and self._is_ours(found):
                with plain_errors(self.path):
                    fs.rm_file(path)
        except UserError as e:
            logger.warning("the lock stays behind: %s", e)

    def _watch(self, first: bytes) -> None:
        """Return once the record is gone, or has not changed for WATCH_S. Raises UserError if it changes."""
        logger.info("%s: a record of %s; watching it for %g s", self.path, owner_of(first), WATCH_S)
        until = time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 2)
            found = self._read()
            if found is None:
                return
            if found != first:
                raise UserError(refusal(self.uri, owner_of(found)))
        logger.warning("%s: %s has stopped; its lock is taken over", self.path, owner_of(first))

    def _beat(self) -> None:
        while self._taken_by is None and not self._stop.wait(BEAT_S):
            try:
                self._renew()
            except UserError as e:
                logger.warning("the lock was not renewed: %s", e)

    def _renew(self) -> None:
        """Write the record again, unless it is another's now. One that was deleted is put back."""
        with self._one_at_a_time:
            found = self._read()
            if found is not None and not self._is_ours(found):
                self._taken_by = owner_of(found)
            else:
                self._write()

    def _read(self) -> bytes | None:
        """What is in the record now; None where there is none."""
        fs, path = filesystem(self.path)
        with plain_errors(self.path), suppress(FileNotFoundError):
            return bytes(fs.cat_file(path))
        return None

    def _write(self) -> None:
        started = time.monotonic()
        holder = Holder(
            token=self.token, host=socket.gethostname(), pid=os.getpid(), when=datetime.now(UTC).isoformat()
        )
        write_bytes(self.path, holder.model_dump_json().encode())
        self._renewed = started

    def _is_ours(self, content: bytes) -> bool:
        return self.token.encode() in content


def refusal(uri: str, owner: str) -> str:
    """One line on a folder that ``owner`` holds."""
    return f"out: {uri} is being written by {owner}; wait or choose another --out"


def owner_of(content: bytes | None) -> str:
    """Process and host in a record, as far as it can be read."""
    try:
        holder = Holder.model_validate_json(content or b"")
    except ValidationError:
        return "another process"
    return f"process {holder.pid} on {holder.host}"
