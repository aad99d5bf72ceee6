"""Files by local path or fsspec URI: whole reads, atomic writes, hashes, one error style."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec

from dmm_ray.errors import UserError

CHUNK_BYTES = 8 << 20
MAGIC = "*?["
"""What a pattern of files has at least one of."""
WRITE_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "no permission to write here; choose another --out or change its owner",
    errno.EPERM: "no permission to write here; choose another --out or change its owner",
    errno.EROFS: "it cannot be written to; choose another --out",
}
"""What to do about a local file that cannot be written, by error number."""
OBJECT_STORES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": None, "abfss": None, "az": None}
"""Protocols without real folders and with a cache of listings, and the extra of this package that brings them."""
CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("aiohttp", "ClientError"),
)
"""What clients of stores raise that is no OSError."""
REMEDY = (
    "check the address, the credentials and the endpoint "
    "(for S3: AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` (a local path or an fsspec URI) and the path on it.

    A local path is a path, whatever characters it has: only a URI can be a chain of file systems (``zip://a::s3://b``).
    Object stores are listed anew each time: a cached listing hides what other processes have written.
    """
    if not _protocol(uri):
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(str(uri)))
    options = {"use_listings_cache": False} if _protocol(uri) in OBJECT_STORES else {}
    try:
        fs, path = fsspec.core.url_to_fs(str(uri), **options)
    except (ValueError, ImportError) as e:
        extra = OBJECT_STORES.get(_protocol(uri)) if isinstance(e, ImportError) else None
        remedy = f"pip install 'dmm-ray[{extra}]'" if extra else "use a local path or an fsspec URI"
        raise UserError(f"{uri}: no filesystem for this address ({e}); {remedy}") from e
    return fs, path


@contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Make what a store elsewhere raises (credentials, permission, bucket, network) a UserError that names ``uri``.

    Errors of this machine's own file system pass unchanged.
    """
    try:
        yield
    except _store_errors() as e:
        if is_local(uri):
            raise
        raise UserError(f"{uri}: {' '.join(str(e).split()) or type(e).__name__}; {REMEDY}") from e


def _store_errors() -> tuple[type[Exception], ...]:
    """OSError and those of CLIENT_ERRORS whose module is loaded."""
    loaded = [(sys.modules[module], name) for module, name in CLIENT_ERRORS if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, name in loaded))


def _protocol(uri: str) -> str:
    protocol, colon, _ = str(uri).partition("://")
    return protocol if colon else ""


def is_local(uri: str) -> bool:
    """Whether ``uri`` is on this machine's own file system."""
    protocol = filesystem(uri)[0].protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def absolute(uri: str | Path) -> str:
    """``uri`` as another process sees it: local paths made absolute, other URIs unchanged."""
    text = str(uri)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def join(uri: str | Path, *parts: str) -> str:
    """``uri`` with ``parts`` appended, separated by single slashes."""
    return "/".join([str(uri).rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is at ``uri``."""
    fs, path = filesystem(uri)
    with plain_errors(uri):
        return bool(fs.exists(path))


def remove_folder(uri: str) -> None:
    """Delete a folder recursively if it exists."""
    fs, path = filesystem(uri)
    with plain_errors(uri):
        if not fs.exists(path):
            return
        if is_local(uri) or not any(c in path for c in MAGIC):
            fs.rm(path, recursive=True)
            return
        for file in fs.find(path):  # rm would take the path for a pattern
            fs.rm_file(file)


class Listing(NamedTuple):
    """What is below a folder, sorted by path."""

    files: list[str]
    broken: list[str]
    """Symbolic links that lead nowhere."""


def list_with_broken_links(uri: str) -> Listing:
    """As :func:`list_files`, and the links that lead nowhere, which only local folders have."""
    fs, path = filesystem(uri)
    with plain_errors(uri):
        if fs.isfile(path):
            return Listing([str(uri)], [])
        if is_local(uri):
            names = sorted(_walk(path))
            files = list(filter(os.path.isfile, names))
            return Listing(files, [name for name in names if not os.path.exists(name)])
        found = sorted(p for p in fs.find(path) if not p.endswith("/"))
    return Listing([fs.unstrip_protocol(p) for p in found], [])


def list_files(uri: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Every file below the folder ``uri``, or ``uri`` itself when it is a file, sorted by path; none if it is neither.

    Symbolic links are followed; one that leads nowhere is no file.
    """
    return [file for file in list_with_broken_links(uri).files if file.endswith(suffixes)]


def match_files(pattern: str) -> list[str]:
    """The files that a pattern with ``*``, ``?`` or ``[..]`` matches, sorted by path."""
    fs, path = filesystem(pattern)
    if not any(c in path for c in MAGIC):
        return []
    with plain_errors(pattern):
        found = sorted(p for p in fs.glob(path) if fs.isfile(p))
    return [fs.unstrip_protocol(p) if not is_local(pattern) else p for p in found]


def _walk(folder: str) -> Iterator[str]:
    """Every name below a local folder but folders, broken links too; linked folders are entered, each once."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(here, name) for name in names)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises UserError if it is missing."""
    fs, path = filesystem(uri)
    with plain_errors(uri):
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise UserError(f"{uri}: no such file") from e


TEMPORARY = ".tmp-"
"""In the name of a file that is not whole yet."""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name then renamed (local), or by one put."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        with plain_errors(uri):
            fs.pipe_file(path, data)
        return
    try:
        with whole(path) as f:
            f.write(data)
    except OSError as e:
        if e.errno not in WRITE_REMEDIES:
            raise
        raise UserError(f"{uri}: {WRITE_REMEDIES[e.errno]}") from e


@contextmanager
def whole(path: str) -> Iterator[BinaryIO]:
    """A local file that appears under its name, on the disk, only when the block ends well."""
    make_folder(os.path.dirname(path) or ".")
    temporary = f"{path}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def make_folder(uri: str) -> None:
    """Create a folder and its parents; on an object store nothing, where only buckets could be created.

    Raises:
        UserError: that is not permitted, or a file is in the way.
    """
    fs, path = filesystem(uri)
    if _protocol(uri) in OBJECT_STORES:
        return
    try:
        fs.makedirs(path, exist_ok=True)
    except PermissionError as e:
        raise UserError(
            f"{uri}: no permission to write here; choose another --out or change its owner"
        ) from e
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(f"{uri}: a file is in the way of this folder; choose another --out") from e
    except OSError as e:
        raise UserError(f"{uri}: cannot be created ({e.strerror}); choose another --out") from e
    if is_local(uri) and not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{uri}: no permission to write here; choose another --out or change its owner")


def read_json(uri: str) -> Any:
    """A JSON file's content. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{uri}: not valid JSON ({e}); the file is damaged or not one of ours") from e


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused."""
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def iter_chunks(uri: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from ``start`` to ``stop`` in chunks of at most 8 MiB."""
    fs, path = filesystem(uri)
    left = float("inf") if stop is None else stop - start
    with plain_errors(uri), fs.open(path, "rb") as f:
        f.seek(start)
        while left > 0 and (chunk := f.read(int(min(CHUNK_BYTES, left)))):
            left -= len(chunk)
            yield chunk


def sha256(uri: str) -> str:
    """The hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    for chunk in iter_chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """The hex SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
