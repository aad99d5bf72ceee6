"""One writer at a time in a local folder: a kernel lock, gone with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dmm_ray.errors import UserError
from dmm_ray.files import filesystem, is_local

LOCK = ".lock"


@contextmanager
def writer_lock(uri: str) -> Iterator[None]:
    """Hold the folder ``uri`` for writing; folders on other filesystems are not locked.

    Raises:
        UserError: another process holds it; the message names its id.
    """
    if not is_local(uri):
        yield
        return
    path = os.path.join(filesystem(uri)[1], LOCK)
    handle = _acquire(path, uri)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _acquire(path: str, uri: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            owner = os.read(handle, 32).decode() or "unknown"
            os.close(handle)
            raise UserError(
                f"out: {uri} is being written by process {owner}; wait or choose another --out"
            ) from e
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            os.truncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # the holder unlinked this file between our open and our lock
