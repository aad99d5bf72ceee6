"""One optimisation step: loss, gradients, learning rate, weight average; all functions of the batch number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmm_ray.gaussians import GaussianMixture
from dmm_ray.prior.flow import batch_levels, interpolate
from dmm_ray.prior.noise import normal
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.parallel import local_shard

STREAM_TRAIN, STREAM_VALIDATION = 16, 17
"""Noise streams of training; inference uses others."""


def learning_rate(config: TrainConfig, peak: float, batch: int) -> float:
    """Linear warm-up from 1 % of ``peak``, then a cosine to ``final_lr * peak`` at the last batch."""
    optimizer = config.optimizer
    progress = batch / config.schedule.total_batches
    if progress < optimizer.warmup:
        return peak * (0.01 + 0.99 * progress / optimizer.warmup)
    way = (progress - optimizer.warmup) / (1 - optimizer.warmup)
    return peak * (optimizer.final_lr + (1 - optimizer.final_lr) * (1 + math.cos(math.pi * way)) / 2)


def ema_exponent(sigma_rel: float) -> float:
    """gamma of the power-function average of relative width sigma_rel (Karras et al. 2024, eq. 123: EDM2)."""
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) falls in gamma: bisection.
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        width = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


class Ema:
    """Power-function average of the weights: ``beta = (1 - 1/n)^(gamma + 1)`` after batch n, a function of n alone."""

    def __init__(self, denoiser: nn.Module, sigma_rel: float) -> None:
        self.gamma = ema_exponent(sigma_rel)
        self.source = list(denoiser.parameters())
        self.names = [name for name, _ in denoiser.named_parameters()]
        self.average = [p.detach().clone() for p in self.source]

    def update(self, batches: int) -> None:
        """Update with the weights after ``batches`` batches (counted from 1)."""
        beta = (1 - 1 / batches) ** (self.gamma + 1)
        torch._foreach_lerp_([local_shard(a) for a in self.average], self._weights(), 1 - beta)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by name, sharded as the weights are."""
        return dict(zip(self.names, self.average, strict=True))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the denoiser has the averaged weights, and the average the denoiser's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights(), self.average, strict=True):
            before = weight.clone()
            weight.copy_(local_shard(average))
            local_shard(average).copy_(before)

    def _weights(self) -> list[Tensor]:
        return [local_shard(p.detach()) for p in self.source]


class FlowBatch:
    """Rows ``share`` of a global batch on the path: the network's inputs and targets.

    With a base, the target is the residual of the base's velocity.

    Sample i of a batch has level ``i // run``; a share that does not cut a run needs no index per row.

    Attributes:
        u_B: noise level of every row.
    """

    def __init__(
        self,
        config: TrainConfig,
        batch: int,
        share: slice,
        z_BD: Tensor,
        base: GaussianMixture | None = None,
    ) -> None:
        device, levels = z_BD.device, config.schedule.levels
        run = config.schedule.batch // levels
        u_M = batch_levels(config.seed, batch, levels).to(device)
        self.u_M, self.index = u_M[share.start // run : -(-share.stop // run)], None
        level = torch.arange(share.start, share.stop, device=device) // run - share.start // run
        if share.start % run or share.stop % run:
            self.index = level
        first = batch * config.schedule.batch
        ids = torch.arange(first + share.start, first + share.stop, device=device)
        noise = normal(config.seed, ids, z_BD.shape[1], STREAM_TRAIN)
        self.u_B = self.u_M[level]
        self.z_u = interpolate(z_BD, noise, self.u_B)
        self.target = residual(noise - z_BD, self.z_u, self.u_B, base)

    def loss(self, model: nn.Module, bf16: bool) -> Tensor:
        """The :func:`flow_loss` of the rows."""
        return flow_loss(model, self.z_u, self.target, self.u_M, self.index, bf16)


@torch.no_grad()
def residual(velocity: Tensor, z_u: Tensor, u_B: Tensor, base: GaussianMixture | None) -> Tensor:
    """What a base leaves of the velocity (B, D) of rows z_u (B, D) at levels u (B,)."""
    return velocity if base is None else velocity - base.velocity(z_u, u_B)


def flow_loss(
    model: nn.Module, z_u: Tensor, target: Tensor, u_M: Tensor, index: Tensor | None, bf16: bool
) -> Tensor:
    """Squared error of the velocity for every row (B,), averaged over dimensions, in float32."""
    with torch.autocast(z_u.device.type, dtype=torch.bfloat16, enabled=bf16):
        velocity = model(z_u, u_M, index)
    return (velocity.float() - target).square().mean(1)
