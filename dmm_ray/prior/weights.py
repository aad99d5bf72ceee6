"""Weight files read by memory map, so that a prior of many gigabytes is held once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import filesystem, is_local, iter_chunks


def read_tensors(uri: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in float32 (16-bit floats widen exactly).

    Float32 tensors are the file's own pages, read when first used: the file may be replaced meanwhile, but not written
    into. A file elsewhere is first copied to a temporary one.

    Raises:
        UserError: missing or damaged.
    """
    with _local(uri) as path:
        try:
            tensors = safetensors.torch.load_file(path)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise UserError(f"{uri}: no such file; copy the prior again") from e
        except safetensors.SafetensorError as e:
            raise UserError(f"{uri}: damaged ({e}); copy or train the prior again") from e
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


@contextmanager
def _local(uri: str) -> Iterator[str]:
    """A path on this machine to the file's content; a copy is deleted at the end (mapped pages outlive that)."""
    if is_local(uri):
        yield filesystem(uri)[1]
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        for chunk in iter_chunks(uri):
            copy.write(chunk)
        copy.flush()
        yield copy.name
