"""Parallel training: each worker's share of a batch, replicated (DDP) or sharded (FSDP2) weights, small collectives."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dmm_ray.errors import UserError
from dmm_ray.prior.network import Denoiser


class RankInfo(NamedTuple):
    """A worker's rank, world size and device."""

    rank: int
    world_size: int
    device: torch.device
    on_ray: bool = False
    """Whether this is a Ray Train worker."""

    def share(self, batch: int) -> slice:
        """This worker's contiguous part of a global batch."""
        return slice(batch * self.rank // self.world_size, batch * (self.rank + 1) // self.world_size)

    def pieces(self, batch: int, most: int | None) -> list[slice]:
        """The share cut into nearly equal parts of at most ``most`` rows, the same number of parts on every worker."""
        share, n = self.share(batch), 1
        if most is not None:
            largest = -(-batch // self.world_size)
            n = -(-largest // most)
        ends = [share.start + (share.stop - share.start) * i // n for i in range(n + 1)]
        return [slice(low, high) for low, high in pairwise(ends)]


class ParallelDenoiser:
    """The denoiser as one worker trains it.

    If ``sharded``, its weights are DTensors, sharded by rows over the workers; those of each block, and within it of
    each time projection (which runs before the blocks), are gathered while it computes. Else every worker has all.

    Args:
        denoiser: on the CPU; sharded in place.
        rank_info: this worker's rank, world size and device.
        sharded: whether to shard.
        compiled: whether to compile the network with torch.compile.

    Raises:
        UserError: compiling on a CPU without a C++ compiler.

    Attributes:
        denoiser: the module that holds the weights.
        called: the module that a training step calls.
    """

    def __init__(self, denoiser: Denoiser, rank_info: RankInfo, sharded: bool, compiled: bool) -> None:
        if compiled:
            check_compiler(rank_info.device)
        self.denoiser, self.sharded = denoiser, sharded
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        self.called: nn.Module = denoiser
        if sharded:
            shard(denoiser, rank_info, compiled)
            return
        denoiser.to(rank_info.device)
        if rank_info.world_size > 1:
            self.called = self._ddp = nn.parallel.DistributedDataParallel(denoiser)
        if compiled:
            self.called = cast(nn.Module, torch.compile(self.called))

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Context of a piece's forward and backward pass: gradients are reduced over the workers after the last piece.

        Sharded ones are reduced after every piece, so that no worker ever holds all of them.
        """
        return self._ddp.no_sync() if self._ddp and not last else nullcontext()

    def reshard(self) -> None:
        """Free the gathered weights after a forward pass without a backward pass."""
        if isinstance(self.denoiser, FSDPModule):
            self.denoiser.reshard()


def shard(denoiser: Denoiser, rank_info: RankInfo, compiled: bool) -> None:
    """Shard the weights over all workers, by rows (FSDP2), and move them to the device, block by block."""
    mesh = init_device_mesh(rank_info.device.type, (rank_info.world_size,))
    for block in denoiser.blocks:
        if compiled:
            block.compile()
        fully_shard(block.time_proj, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def check_compiler(device: torch.device) -> None:
    """Raises UserError on a CPU without the C++ compiler that torch.compile needs."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "compile: torch.compile needs a C++ compiler (g++, or CXX); install one or leave it out"
        )


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's rows of a tensor, sharing its memory; all rows if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on its device. Collective for a sharded one: every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The index of this worker's first row of a tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    chunk = -(-len(tensor) // tensor.device_mesh.size())
    start = min(len(tensor), chunk * tensor.device_mesh.get_local_rank())
    assert len(local_shard(tensor)) == min(chunk, len(tensor) - start)
    return start


class CpuGroup:
    """Ranks that exchange small tensors on the CPU (gloo). Collective: every rank must build it and call it alike.

    Args:
        rank: this worker's rank.
        world_size: number of ranks.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; all must have the same shape and dtype."""
        if self._group is None:
            return [numbers]
        found = [torch.empty_like(numbers) for _ in range(self.world_size)]
        dist.all_gather(found, numbers, group=self._group)
        return found
