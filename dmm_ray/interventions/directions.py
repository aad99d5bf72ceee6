"""Steering directions: unit vectors in safetensors files."""

from __future__ import annotations

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import join, list_files, read_bytes, write_bytes
from dmm_ray.prior.weights import read_header

SUFFIX = ".safetensors"
TENSOR, LAYER = "direction", "layer"


@dataclass(frozen=True)
class Direction:
    """A direction in a layer's activations.

    Args:
        name: its name; the file is ``NAME.safetensors``.
        vector: (d,), finite and not all zero; stored with length 1, float32.
        layer: the block whose output it belongs to; None for any.

    Raises:
        UserError: the vector has the wrong shape, is all zero, or contains NaN or Inf.

    Example:
        >>> Direction("cheerful", torch.tensor([3.0, 4.0])).vector
        tensor([0.6000, 0.8000])
    """

    name: str
    vector: Tensor
    layer: int | None = None

    def __post_init__(self) -> None:
        vector = self.vector.detach().to("cpu", torch.float32)
        if vector.ndim != 1:
            raise UserError(f"direction {self.name}: expected shape (d,), got {tuple(vector.shape)}")
        length = float(vector.double().norm())
        if not 0 < length < float("inf"):
            raise UserError(f"direction {self.name}: expected finite numbers that are not all zero")
        object.__setattr__(self, "vector", (vector.double() / length).float())

    def save(self, folder: str) -> str:
        """Write ``NAME.safetensors`` into ``folder``; returns the file's path.

        Example:
            >>> Direction("cheerful", torch.randn(64), layer=2).save("runs/directions").endswith("cheerful.safetensors")
            True
        """
        path = join(folder, self.name + SUFFIX)
        metadata = None if self.layer is None else {LAYER: str(self.layer)}
        write_bytes(path, safetensors.torch.save({TENSOR: self.vector}, metadata))
        return path


def load_directions(folder: str) -> dict[str, Direction]:
    """Every direction in a folder (a local path or an fsspec URI), by name.

    A file contains one tensor ``direction`` (d,), and may have ``{"layer": "7"}`` in its metadata.

    Raises:
        UserError: there is no such folder, a file is damaged or has the wrong content, or two files in subfolders have
            the same name.
    """
    paths = list_files(folder, (SUFFIX,))
    if not paths:
        raise UserError(f"directions: no {SUFFIX} files in {folder}; give a folder that contains some")
    found: dict[str, Direction] = {}
    for path in paths:
        direction = _load(path)
        if direction.name in found:
            raise UserError(f"{path}: another file has the same name; rename one of them")
        found[direction.name] = direction
    return found


def _load(path: str) -> Direction:
    data = read_bytes(path)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as e:
        raise UserError(f"{path}: damaged, or not a safetensors file ({e})") from e
    if set(tensors) != {TENSOR}:
        raise UserError(f"{path}: expected one tensor named {TENSOR}, got {sorted(tensors) or 'none'}")
    return Direction(path.rsplit("/", 1)[-1].removesuffix(SUFFIX), tensors[TENSOR], _layer(path, data))


def _layer(path: str, data: bytes) -> int | None:
    """The layer stated in a file's metadata, if any."""
    header, _ = read_header(lambda a, b: data[a:b])
    stated = header.get("__metadata__", {}).get(LAYER)
    if stated is not None and not stated.isdecimal():
        raise UserError(f"{path}: metadata {LAYER} must be the index of a block, got {stated!r}")
    return None if stated is None else int(stated)
