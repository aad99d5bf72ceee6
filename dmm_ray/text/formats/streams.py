"""Files opened as byte streams: hashed while read, decompressed, damage told from other errors."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa
from fsspec.implementations.memory import MemoryFile

from dmm_ray.errors import UserError
from dmm_ray.files import filesystem, plain_errors

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files."""
READ_BYTES = 256 << 10
"""Read at once: little, so that a single document costs little; file systems read ahead by themselves."""


class DamagedError(ValueError):
    """A file that is not what its name says, or not all of it."""


class VariantError(ValueError):
    """A file in a variant of its format that is not read; the message says which, and what to do."""


@contextmanager
def opened(uri: str) -> Iterator[BinaryIO]:
    """A seekable byte file with a position of its own.

    Raises:
        UserError: there is no such file, no permission, or its bytes cannot be had or decoded while it is open.
    """
    with plain_errors(uri), _opened(uri) as file, _damage(uri):
        yield file


def _opened(uri: str) -> BinaryIO:
    fs, path = filesystem(uri)
    try:
        file = fs.open(path, "rb")
    except FileNotFoundError as e:
        raise UserError(f"text: {uri}: no such file any more; put it back and run again") from e
    except PermissionError as e:
        raise UserError(f"text: {uri}: no permission to read it") from e
    if isinstance(file, MemoryFile):  # its readers would share one position
        return io.BytesIO(file.getvalue())
    return cast(BinaryIO, file)


@contextmanager
def _damage(uri: str) -> Iterator[None]:
    try:
        yield
    except VariantError as e:
        raise UserError(f"text: {uri}: {e}") from e
    except (EOFError, zlib.error, OSError, pa.ArrowException, DamagedError) as e:
        if isinstance(e, OSError) and not _is_decoding(e):
            raise
        reason = str(e).strip().split("\n")[0]
        if "too much memory for decoding" in reason:  # zstd's own words
            raise UserError(
                f"text: {uri}: zstd with a long window (--long), which is not read; compress it again without"
            ) from e
        raise UserError(f"text: {uri}: damaged, cut short or not what its suffix says ({reason})") from e


def _is_decoding(error: OSError) -> bool:
    """Whether a decoder raised ``error``: those of files and networks have a number or a class of their own."""
    return isinstance(error, gzip.BadGzipFile) or (type(error) is OSError and error.errno is None)


def length(file: BinaryIO) -> int:
    """A file's size in bytes; the position goes back to the start."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(0)
    return size


def decompressed(file: BinaryIO, codec: str | None) -> BinaryIO:
    """The content of ``file``, of all its gzip members or zstd frames."""
    if codec == "zstd":
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if codec else file


class Hashed(io.RawIOBase):
    """A file whose bytes are hashed when they are read for the first time. Closing it leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hashed = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes."""
        at = self._file.tell()
        data = self._file.read(size)
        if at == self._hashed:
            self._digest.update(data)
            self._hashed += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def sha256(self) -> str:
        """The hex SHA-256 of the whole file; reads what has not been read."""
        self._file.seek(self._hashed)
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()
