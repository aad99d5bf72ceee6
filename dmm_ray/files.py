"""Files by local path or fsspec URI: reading, atomic writing, listing and hashing, with uniform errors."""

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
"""Characters that make a path a glob pattern."""
WRITE_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "no permission to write here; choose another --out or change its owner",
    errno.EPERM: "no permission to write here; choose another --out or change its owner",
    errno.EROFS: "the file system is read-only; choose another --out",
}
"""Remedies for a local file that cannot be written, by error number."""
OBJECT_STORES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": None, "abfss": None, "az": None}
"""Protocols without real folders and with cached listings, and the extra of this package that installs each."""
CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("aiohttp", "ClientError"),
)
"""Exceptions of object store clients that are not OSErrors."""
REMEDY = (
    "check the address, the credentials and the endpoint "
    "(for S3: AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` (a local path or an fsspec URI) and the path on it.

    A local path is taken literally, whatever characters it contains: only a URI can be a chain of filesystems
    (``zip://a::s3://b``). Object stores are listed without a cache, which would hide what other processes have written.
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
    """Turn errors of remote storage (credentials, permission, bucket, network) into a UserError that names ``uri``.

    Errors of the local filesystem propagate unchanged.
    """
    try:
        yield
    except _store_errors() as e:
        if is_local(uri):
            raise
        raise UserError(f"{uri}: {' '.join(str(e).split()) or type(e).__name__}; {REMEDY}") from e


def _store_errors() -> tuple[type[Exception], ...]:
    """OSError and the CLIENT_ERRORS whose module is loaded."""
    loaded = [(sys.modules[module], name) for module, name in CLIENT_ERRORS if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, name in loaded))


def _protocol(uri: str) -> str:
    protocol, colon, _ = str(uri).partition("://")
    return protocol if colon else ""


def is_local(uri: str) -> bool:
    """Whether ``uri`` is on the local filesystem."""
    protocol = filesystem(uri)[0].protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def absolute(uri: str | Path) -> str:
    """``uri`` in a form that is valid in any process: local paths made absolute, other URIs unchanged."""
    text = str(uri)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def join(uri: str | Path, *parts: str) -> str:
    """``uri`` with ``parts`` appended, separated by single slashes."""
    return "/".join([str(uri).rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder exists at ``uri``."""
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
        for file in fs.find(path):  # rm would treat the path as a pattern
            fs.rm_file(file)


class Listing(NamedTuple):
    """The contents of a folder and its subfolders, sorted by path."""

    files: list[str]
    broken: list[str]
    """Broken symbolic links."""


def list_with_broken_links(uri: str) -> Listing:
    """Like :func:`list_files`, but also lists broken symbolic links, which only local folders have."""
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
    """Every file below the folder ``uri``, or ``uri`` itself if it is a file, sorted by path; empty if it is neither.

    Symbolic links are followed; broken ones are omitted.
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
    """Every path below a local folder except folders, broken links included; linked folders are visited once each."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(here, name) for name in names)


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises UserError if it is missing."""
    fs, path = filesystem(uri)
    with plain_errors(uri):
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise UserError(f"{uri}: no such file") from e


TEMPORARY = ".tmp-"
"""Marks the name of a file that is still being written."""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: under a temporary name and then renamed (local), or by a single put."""
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
    """Open a local file that appears under its name, synced to disk, only if the block succeeds."""
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
    """Create a folder and its parents; does nothing on an object store, where only buckets could be created.

    Raises:
        UserError: permission is denied, or a file is in the way.
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
        raise UserError(
            f"{uri}: not valid JSON ({e}); the file is damaged or was not written by dmm-ray"
        ) from e


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for NaN and Inf."""
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def iter_chunks(uri: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from ``start`` to ``stop`` in chunks of at most 8 MiB."""
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
