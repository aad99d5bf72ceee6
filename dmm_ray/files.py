"""Files by local path or fsspec URI: whole reads, atomic writes, hashes, one error style."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from dmm_ray.errors import UserError

CHUNK_BYTES = 8 << 20


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` (a local path or an fsspec URI) and the path on it."""
    try:
        fs, path = fsspec.core.url_to_fs(str(uri))
    except (ValueError, ImportError) as e:
        raise UserError(
            f"{uri}: no filesystem for this address ({e}); use a local path or an fsspec URI"
        ) from e
    return fs, path


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
    return bool(fs.exists(path))


def list_files(uri: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Every file below ``uri`` (or ``uri`` itself when it is a file, or a glob's matches), sorted by path."""
    fs, path = filesystem(uri)
    if any(c in path for c in "*?["):
        found = [p for p in fs.glob(path) if fs.isfile(p)]
    elif fs.isfile(path):
        return [str(uri)]
    else:
        found = fs.find(path)
    kept = sorted(p for p in found if p.endswith(suffixes))
    return [fs.unstrip_protocol(p) if not is_local(uri) else p for p in kept]


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises UserError if it is missing."""
    fs, path = filesystem(uri)
    try:
        return fs.cat_file(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError(f"{uri}: no such file") from e


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name then renamed (local), or by one put."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        fs.pipe_file(path, data)
        return
    make_folder(os.path.dirname(path) or ".")
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except PermissionError as e:
        raise UserError(
            f"{uri}: no permission to write here; choose another --out or change its owner"
        ) from e
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def make_folder(uri: str) -> None:
    """Create a folder and its parents. Raises UserError where that is not permitted or a file is in the way."""
    fs, path = filesystem(uri)
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
    with fs.open(path, "rb") as f:
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
