"""Memory-mapped weight files, so that a prior of many gigabytes is held only once."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import filesystem, is_local, iter_chunks

HEADER_BYTES = 8
"""Size of the little-endian header length that a safetensors file begins with."""
SAMPLED = 256
"""Most elements of each tensor that fingerprints and change detection look at."""
LFS = b"version https://git-lfs"
"""How a Git LFS pointer, which stands for a large file in a Git repository, begins."""


def read_tensors(uri: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in float32 (16-bit floats widen exactly).

    Float32 tensors are the file's own pages: while they are in use, the file may be replaced but not written to. A
    remote file is first copied to a temporary one.

    Raises:
        UserError: the file is missing, damaged or a Git LFS pointer, or a tensor is not floating-point or contains NaN
            or Inf.
    """
    with _local(uri) as path:
        try:
            _refuse_pointer(uri, path)
            tensors = safetensors.torch.load_file(path)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise UserError(f"{uri}: no such file; copy the prior again") from e
        except safetensors.SafetensorError as e:
            raise UserError(f"{uri}: damaged ({e}); copy or train the prior again") from e
    return {name: _as_float32(f"{uri}: {name}", tensor) for name, tensor in tensors.items()}


def _as_float32(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name} has dtype {kind}, expected floating point; copy or train the prior again")
    tensor = tensor.to(torch.float32)
    # The extremes reveal NaN and Inf without a mask as large as the tensor.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(f"{name} contains NaN or Inf in float32; copy or train the prior again")
    return tensor


def _refuse_pointer(uri: str, path: str) -> None:
    with open(path, "rb") as f:
        if f.read(len(LFS)) == LFS:
            raise UserError(
                f"{uri}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
            )


@contextmanager
def _local(uri: str) -> Iterator[str]:
    """A local path to the file's content; a temporary copy is deleted at the end (mapped pages outlive it)."""
    if is_local(uri):
        yield filesystem(uri)[1]
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        for chunk in iter_chunks(uri):
            copy.write(chunk)
        copy.flush()
        yield copy.name


def read_header(read: Callable[[int, int], bytes | bytearray]) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, its metadata included, and where the tensors' bytes begin.

    Args:
        read: returns the file's bytes from one offset to another.
    """
    start = HEADER_BYTES + int.from_bytes(read(0, HEADER_BYTES), "little")
    return json.loads(read(HEADER_BYTES, start)), start


def sampled(tensor: Tensor) -> Tensor:
    """A view of at most ``SAMPLED`` evenly spaced elements of a contiguous tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLED))]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' names, shapes and some of their elements, in float32.

    It quickly tells different trained weights apart, however large; a manual edit of a few elements may escape it.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(sampled(tensor.contiguous()).to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()
