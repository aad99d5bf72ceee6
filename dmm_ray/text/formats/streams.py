"""Opens files as byte streams: hashing while reading, decompression, and detection of damaged files."""

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
"""Bytes per read: small, so that reading a single document is cheap; file systems do their own read-ahead."""


class DamagedError(ValueError):
    """A file that is truncated or not of the format that its name indicates."""


class VariantError(ValueError):
    """A file in an unsupported variant of its format; the message names the variant and the remedy."""


@contextmanager
def opened(uri: str) -> Iterator[BinaryIO]:
    """A seekable byte file with an independent position.

    Raises:
        UserError: the file does not exist, permission is denied, or reading or decoding fails while it is open.
    """
    with plain_errors(uri), _opened(uri) as file, _damage(uri):
        yield file


def _opened(uri: str) -> BinaryIO:
    fs, path = filesystem(uri)
    try:
        file = fs.open(path, "rb")
    except FileNotFoundError as e:
        raise UserError(f"text: {uri}: the file no longer exists; restore it and run again") from e
    except PermissionError as e:
        raise UserError(f"text: {uri}: no permission to read it") from e
    if isinstance(file, MemoryFile):  # otherwise, its readers would share one position
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
        if "too much memory for decoding" in reason:  # zstd's own message
            raise UserError(
                f"text: {uri}: compressed with a long zstd window (--long), which is unsupported; recompress it without"
            ) from e
        raise UserError(
            f"text: {uri}: damaged, truncated or not in the format of its suffix ({reason})"
        ) from e


def _is_decoding(error: OSError) -> bool:
    """Whether a decoder raised ``error``: file and network errors have an errno or a subclass."""
    return isinstance(error, gzip.BadGzipFile) or (type(error) is OSError and error.errno is None)


def length(file: BinaryIO) -> int:
    """The size of a file in bytes; resets the position to the start."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(0)
    return size


def decompressed(file: BinaryIO, codec: str | None) -> BinaryIO:
    """The decompressed content of ``file``, including all gzip members or zstd frames."""
    if codec == "zstd":
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if codec else file


class Hashed(io.RawIOBase):
    """A file whose bytes are hashed when first read. Closing it leaves the underlying file open."""

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
        """Change the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The current position."""
        return self._file.tell()

    def sha256(self) -> str:
        """The hex SHA-256 of the complete file; reads whatever has not been read yet."""
        self._file.seek(self._hashed)
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()
