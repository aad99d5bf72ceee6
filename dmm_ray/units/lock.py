"""Ensures a single writer per folder: a kernel lock on local disks, a record with a heartbeat elsewhere."""

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
"""Seconds between rewrites of the record by its holder."""
LOST_S = 20.0
"""A holder whose heartbeat is overdue by this long checks that the record is still its own before it continues."""
WATCH_S = 30.0
"""A record that has not changed for this long is stale. Must exceed LOST_S."""
SETTLE_S = 2.0
"""After writing its first record, a process waits this long and rereads it, in case two started at once."""


class WriterLock(Protocol):
    """Held by the single writer of a folder."""

    def check(self) -> None:
        """Raise CheckFailed if another writer has taken over the folder, or if that cannot be determined."""


@contextmanager
def writer_lock(uri: str) -> Iterator[WriterLock]:
    """Lock the folder ``uri`` for writing; call ``check()`` on the yielded lock between pieces of work.

    On a local disk, the lock of a killed process disappears with it. Elsewhere, its record is first watched for
    ``WATCH_S`` seconds, comparing only contents, never the clocks of two machines.

    Raises:
        UserError: another process, named by the message, holds the lock; or the folder is not writable.
    """
    lock = KernelLock(uri) if is_local(uri) else HeartbeatLock(uri)
    try:
        lock.acquire()
        yield lock
    finally:
        lock.release()


class KernelLock:
    """``flock`` on ``.lock`` in a local folder; released when the process that holds it ends."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._path = os.path.join(filesystem(uri)[1], LOCK)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises UserError naming the process that holds it."""
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
            else:  # the previous holder unlinked this file between our open and our lock: try again
                os.close(handle)

    def check(self) -> None:
        """Do nothing: a kernel lock cannot be lost."""

    def release(self) -> None:
        """Release the lock if it was taken."""
        if self._handle is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._handle)


class Holder(Config):
    """Content of ``.lock``: the current writer. Every heartbeat updates ``when``, which is only for human readers."""

    token: str
    host: str
    pid: int
    when: str


class HeartbeatLock:
    """A ``.lock`` record on a filesystem without kernel locks, rewritten by a background thread while held."""

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
        """Take the lock: watch any existing record, write our own, and check that it persists.

        Raises:
            UserError: another writer's record changes or replaces ours, or the file system fails.
        """
        if (found := self._read()) is not None:
            self._watch(found)
        self._write()
        time.sleep(SETTLE_S)
        if (found := self._read()) is None or not self._is_ours(found):
            raise UserError(refusal(self.uri, owner_of(found)))
        self._thread.start()

    def check(self) -> None:
        """Make sure that the record was renewed recently, by the heartbeat or by this call."""
        try:
            if self._taken_by is None and time.monotonic() - (self._renewed or 0.0) > LOST_S:
                self._renew()
        except UserError as e:
            raise CheckFailed(f"out: the lock cannot be renewed ({e}); run the same command again") from e
        if self._taken_by is not None:
            raise CheckFailed(f"out: {self.uri} was taken over by {self._taken_by}; this run has stopped")

    def release(self) -> None:
        """Stop the heartbeat and delete the record if it is ours."""
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
            logger.warning("the lock could not be removed: %s", e)

    def _watch(self, first: bytes) -> None:
        """Return once the record is gone, or has not changed for WATCH_S. Raises UserError if it changes."""
        logger.info("%s: lock held by %s; watching it for %g s", self.path, owner_of(first), WATCH_S)
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
        """Rewrite the record, or restore it if it was deleted, unless it now belongs to another writer."""
        with self._one_at_a_time:
            found = self._read()
            if found is not None and not self._is_ours(found):
                self._taken_by = owner_of(found)
            else:
                self._write()

    def _read(self) -> bytes | None:
        """The current content of the record; None if there is none."""
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
    """The message for a folder that ``owner`` holds."""
    return f"out: {uri} is being written by {owner}; wait or choose another --out"


def owner_of(content: bytes | None) -> str:
    """The process and host named in a record, as far as it is readable."""
    try:
        holder = Holder.model_validate_json(content or b"")
    except ValidationError:
        return "another process"
    return f"process {holder.pid} on {holder.host}"
