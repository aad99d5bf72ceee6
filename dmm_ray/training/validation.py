"""The loss on fixed validation rows at fixed (u, noise) pairs, of which each worker computes its share."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.gaussians import GaussianMixture
from dmm_ray.prior.flow import interpolate
from dmm_ray.prior.noise import normal
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.store.match import check_finite
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import VALIDATION
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.step import STREAM_VALIDATION, flow_loss, residual

logger = logging.getLogger(__name__)
VALIDATION_LEVELS = 64
"""Row i is noised to level ``i % VALIDATION_LEVELS`` of this many, evenly spaced in (0, 1)."""


class Validation:
    """This worker's share of the validation pairs.

    Args:
        config: the run's configuration.
        z_BD: all validation rows, normalised, on any device; at least one.
        rank_info: this worker's rank, world size and device.
        base: the prior's base, if any.
    """

    def __init__(
        self, config: TrainConfig, z_BD: Tensor, rank_info: RankInfo, base: GaussianMixture | None = None
    ) -> None:
        self.config, self.rank_info, self.n = config, rank_info, len(z_BD)
        half = 0.5 / VALIDATION_LEVELS
        self.u_M = torch.linspace(half, 1 - half, VALIDATION_LEVELS, device=rank_info.device)
        pairs = max(
            self.n, rank_info.world_size
        )  # every worker calls the network equally often, some with a row that does not count
        self.pieces = []
        for piece in rank_info.pieces(pairs, config.distribution.micro_batch):
            ids = torch.arange(piece.start, piece.stop)
            self.pieces.append((ids, *self._pair(ids, z_BD[ids % self.n].to(rank_info.device), base)))

    def _pair(self, ids: Tensor, z_BD: Tensor, base: GaussianMixture | None) -> tuple[Tensor, Tensor]:
        """Noised rows and what the network should say of them, (B, D) each."""
        on_device = ids.to(self.rank_info.device)
        noise = normal(self.config.seed, on_device, z_BD.shape[1], STREAM_VALIDATION)
        u_B = self.u_M[on_device % VALIDATION_LEVELS]
        z_u = interpolate(z_BD, noise, u_B)
        return z_u, residual(noise - z_BD, z_u, u_B, base)

    @torch.no_grad()
    def loss(self, denoiser: nn.Module) -> float:
        """Mean over all rows. Collective: every rank must call this."""
        total = torch.zeros((), dtype=torch.float64, device=self.rank_info.device)
        bf16 = self.config.precision == "bfloat16"
        for ids, z_u, target in self.pieces:
            on_device = ids.to(self.rank_info.device)
            losses = flow_loss(denoiser, z_u, target, self.u_M, on_device % VALIDATION_LEVELS, bf16)
            total += losses.double()[on_device < self.n].sum()
        if self.rank_info.world_size > 1:
            dist.all_reduce(total)
        return float(total) / self.n


def load_validation(
    config: TrainConfig,
    store: ActivationStore,
    layer: int,
    normalizer: Normalizer,
    rank_info: RankInfo,
    base: GaussianMixture | None = None,
) -> Validation | None:
    """The validation of a run; None, with a warning, if no document falls into that part.

    Raises:
        UserError: a row contains NaN or Inf, or there are no rows although ``keep_best`` is set.
    """
    rows = store.select(layer, config.split, VALIDATION, config.validation.validation_rows, config.seed)
    if len(rows.doc) == 0:
        if config.checkpoints.keep_best:
            raise UserError(
                "keep_best: no document falls into the validation part; change --split or leave it out"
            )
        logger.warning("no document falls into the validation part: no validation loss")
        return None
    check_finite(store, layer, rows)
    z_BD = normalizer.normalize(rows.activation.to(rank_info.device))
    return Validation(config, z_BD, rank_info, base)
