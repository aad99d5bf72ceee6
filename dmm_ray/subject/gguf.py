"""Language models in GGUF files, unpacked once per machine into a folder that transformers loads like any other."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import struct
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from dmm_ray.errors import UserError
from dmm_ray.files import sha256
from dmm_ray.subject.quiet import first_line, quiet

logger = logging.getLogger(__name__)
GGUF_SUFFIX = ".gguf"
GGUF_MAGIC = b"GGUF"
CACHE_VARIABLE = "DMM_CACHE"
"""Environment variable that sets the folder for unpacked models; defaults to ~/.cache/dmm-ray."""
REFUSALS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    AssertionError,
    struct.error,
)
"""Exceptions that transformers raises for a file it cannot read: it uses most values without checking them first."""


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix of GGUF files."""
    return path.suffix.lower() == GGUF_SUFFIX and path.is_file()


def unpack(path: Path) -> tuple[Path, str]:
    """Unpack a GGUF file unless that has been done; return the model's folder and the file's SHA-256.

    Weights are dequantised to float32, so the folder takes 4 bytes per weight. It is named after the file's hash and
    created atomically; concurrent processes wait for the first one.

    Args:
        path: path of the file.

    Raises:
        UserError: the file is truncated or not GGUF, has an architecture, quantisation type or tokenizer that
            transformers cannot read, a package is missing, or there is no space.
    """
    _check_header(path)
    state = path.stat()
    digest = _digest(path, state.st_size, state.st_mtime_ns)
    cache = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/dmm-ray").expanduser() / "gguf"
    folder = cache / digest[:32]
    if folder.is_dir():
        return folder, digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _unpack_into(folder, path)
    except OSError as e:
        raise UserError(
            f"{CACHE_VARIABLE}: the unpacked model cannot be kept in {cache} ({first_line(e)}); "
            "set it to a folder with 4 bytes free per weight"
        ) from e
    return folder, digest


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, cached so that a process that loads the file several times hashes it once."""
    return sha256(str(path))


def _unpack_into(folder: Path, path: Path) -> None:
    """Unpack into a temporary folder next to ``folder``, then rename it. The caller holds the lock."""
    for left_over in folder.parent.glob(f"{folder.name}.tmp-*"):  # left by a killed process
        shutil.rmtree(left_over)
    logger.info("unpacking %s into %s (once per machine)", path, folder)
    started = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        _convert(path, temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("unpacked in %.0f s", time.perf_counter() - started)


def _check_header(path: Path) -> None:
    """Raise UserError if the file does not begin like a GGUF file, or a required package is missing."""
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise UserError(
                f"model: {path} is not a GGUF file (it does not begin with {GGUF_MAGIC.decode()})"
            )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"model: a GGUF file requires {package}; pip install 'dmm-ray[gguf]'")


def _check_complete(path: Path) -> None:
    """Raise UserError if the file ends before its last tensor does."""
    from gguf import GGUFReader  # slow to import, and needed by few models

    try:
        reader = GGUFReader(str(path))
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as e:
        raise UserError(f"model: {path} is truncated or damaged ({first_line(e)}); download it again") from e
    if end == 0 or end > path.stat().st_size:
        raise UserError(f"model: {path} is truncated: its tensors end beyond the file; download it again")


def _convert(path: Path, folder: Path) -> None:
    """Convert the model and tokenizer, and save them to ``folder`` in transformers' format."""
    _check_complete(path)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    except REFUSALS as e:
        raise UserError(
            f"model: {path}: transformers cannot build its tokenizer ({first_line(e)}); give the model as a folder"
        ) from e
    # Versions of transformers that can keep weights quantised must be told not to; the others always dequantise.
    if hasattr(transformers, "GgufConfig"):
        place["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except REFUSALS as e:
        raise UserError(
            f"model: {path}: transformers cannot read it ({first_line(e)}); give the model as a folder"
        ) from e
    # Otherwise, loading the folder would look for quantised weights in it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
