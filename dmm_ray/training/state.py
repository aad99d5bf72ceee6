"""A run's training state as named float32 tensors, saved from and restored to the rows of each worker.

Names are ``model.X`` (weights), ``ema.X`` (their average), ``exp_avg.X``, ``exp_avg_sq.X`` and ``step.X`` (AdamW's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.files import iter_chunks
from dmm_ray.prior.weights import read_header
from dmm_ray.training.parallel import first_row, local_shard
from dmm_ray.training.step import Ema

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments of each weight."""

Shape = tuple[int, ...]


class TensorSource(Protocol):
    """Tensors by name that can be read in part."""

    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; for a scalar, its value whatever the range."""


def snapshot(denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """A CPU copy of this worker's rows of all of a run's state."""
    tensors = {f"ema.{name}": t for name, t in ema.state().items()}
    for name, p in denoiser.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": t for key, t in optimizer.state[p].items()}
    return {
        name: local_shard(t).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


def restore(source: TensorSource, denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
    """The inverse of :func:`snapshot`, in place; the rows may have been sharded differently."""
    averages = ema.state()
    for name, p in denoiser.named_parameters():
        state = {key: torch.zeros_like(p.detach()) for key in MOMENTS}
        step = source.rows(f"step.{name}", 0, 0)
        optimizer.state[p] = {"step": step.to(p.device) if p.is_cuda else step, **state}
        for kind, t in {"model": p.detach(), "ema": averages[name], **state}.items():
            mine, start = local_shard(t), first_row(t)
            mine.copy_(source.rows(f"{kind}.{name}", start, start + len(mine)))


def check_architecture(where: str, found: Mapping[str, Shape], denoiser: nn.Module) -> None:
    """Raises UserError naming the first tensor in which a checkpoint found at ``where`` does not fit ``denoiser``."""
    wanted = {
        f"{kind}.{name}": () if kind == "step" else tuple(p.shape)
        for name, p in denoiser.named_parameters()
        for kind in ("model", "ema", "step", *MOMENTS)
    }
    for name in sorted({*wanted, *found}, key=lambda name: (not name.startswith("model."), name)):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where}: of another architecture ({name} is {found.get(name, 'missing')}, "
                f"here {wanted.get(name, 'not wanted')}); choose another --out or delete that folder"
            )


class ShardFile:
    """A safetensors file of float32 tensors whose rows can be read individually."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.header, self.data = read_header(self._read)
        self.header.pop("__metadata__", None)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        return tuple(self.header[name]["shape"])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor."""
        (low, high), shape = self.header[name]["data_offsets"], self.shape(name)
        assert self.header[name]["dtype"] == "F32"
        if shape:
            stride = (high - low) // shape[0] if shape[0] else 0
            low, high, shape = low + start * stride, low + stop * stride, (stop - start, *shape[1:])
        if low == high:
            return torch.empty(shape)
        return torch.frombuffer(self._read(self.data + low, self.data + high), dtype=torch.float32).view(
            shape
        )

    def _read(self, start: int, stop: int) -> bytearray:
        data = bytearray()
        for chunk in iter_chunks(self.uri, start, stop):
            data += chunk
        return data


class ShardedReader:
    """The tensors of several parts, whose rows are concatenated in order. A :class:`TensorSource`."""

    def __init__(self, uris: Sequence[str]) -> None:
        self.parts = [ShardFile(uri) for uri in uris]

    def shapes(self) -> dict[str, Shape]:
        """The full shape of every tensor."""
        found: dict[str, Shape] = {}
        for part in self.parts:
            for name in part.header:
                shape = part.shape(name)
                if shape and name in found:
                    shape = (found[name][0] + shape[0], *shape[1:])
                found[name] = shape
        return found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, from the parts that hold them."""
        holders = [part for part in self.parts if name in part.header]
        if holders[0].shape(name) == ():
            return holders[0].rows(name, 0, 0)
        found, at = [], 0
        for part in holders:
            n = part.shape(name)[0]
            low, high = max(start - at, 0), min(stop - at, n)
            if low < high:
                found.append(part.rows(name, low, high))
            at += n
        return torch.cat(found) if found else holders[0].rows(name, 0, 0)
