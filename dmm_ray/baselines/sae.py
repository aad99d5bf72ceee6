"""Sparse autoencoders as denoisers: TopK (Gao et al. 2024), and thresholded ones (BatchTopK, JumpReLU, ReLU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmm_ray.baselines.base import velocity_from_mean
from dmm_ray.gaussians.levels import levels_of

SAE_FLOATS = 1 << 24
DEAD_ROWS = 65536


class SAE:
    """``x0 = a(E (z - b) + c) D + b``, where ``a`` keeps the k largest latents, or those above a threshold.

    As a denoiser, it is given ``z_u / (1 - u)``, an unbiased estimate of the clean row; at u = 1, where no signal is
    left, it returns the mean.

    Args:
        encoder: (l, d) for l latents.
        encoder_bias: (l,).
        decoder: (l, d).
        bias: (d,), subtracted from the input and added to the output.
        mean: (d,), mean of the training rows.
        k: maximum active latents per row (TopK), or their average (BatchTopK); None if there is no such number.
        threshold: (l,), the value above which each latent is active; None for TopK.
    """

    def __init__(
        self,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        bias: Tensor,
        mean: Tensor,
        k: int | None,
        threshold: Tensor | None = None,
    ) -> None:
        self.encoder = encoder
        self.encoder_bias = encoder_bias
        self.decoder = decoder
        self.bias = bias
        self.mean = mean
        self.k = k
        self.threshold = threshold
        self.seconds = 0.0
        self.dead = 0
        """Number of latents that are active in none of the training rows examined."""

    @property
    def latents(self) -> int:
        """The number of latents, l."""
        return len(self.encoder_bias)

    @property
    def n_parameters(self) -> int:
        """Number of weights and biases."""
        return sum(w.numel() for w in (self.encoder, self.encoder_bias, self.decoder, self.bias))

    @property
    def flops_per_row(self) -> int:
        """FLOPs of a reconstruction; with TopK, only active latents are decoded."""
        active = self.latents if self.k is None or self.threshold is not None else self.k
        return 2 * len(self.bias) * (self.latents + active)

    def reconstruct(self, z_nd: Tensor) -> Tensor:
        """The plain reconstruction (n, d) of rows."""
        return torch.cat([self._reconstruct(rows) for rows in self._chunks(z_nd)])

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``SAE(z_u / (1 - u))``; the mean at u = 1."""
        left_n1 = 1 - levels_of(u_n, len(z_nd), z_nd.device)[:, None]
        return torch.where(left_n1 > 0, self.reconstruct(z_nd / left_n1.clamp_min(1e-6)), self.mean)

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``(z_u - x0) / u``: whatever the reconstruction leaves out counts as noise."""
        return velocity_from_mean(z_nd, self.posterior_mean(z_nd, u_n), u_n)

    def count_dead(self, z_nd: Tensor) -> int:
        """Number of latents that are active in none of the first ``DEAD_ROWS`` rows (n, d)."""
        fired_l = torch.zeros(self.latents, dtype=torch.bool, device=z_nd.device)
        for rows in self._chunks(z_nd[:DEAD_ROWS]):
            latents_nl = self._latents(rows)
            if self.threshold is None:
                values_nk, which_nk = self._topk(latents_nl)
                fired_l[which_nk[values_nk > 0]] = True
            else:
                fired_l |= (latents_nl > self.threshold).any(0)
        return int((~fired_l).sum())

    def _topk(self, latents_nl: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None
        values_nk, which_nk = latents_nl.topk(self.k, dim=1, sorted=False)
        return values_nk, which_nk

    def _latents(self, z_nd: Tensor) -> Tensor:
        return F.linear(z_nd - self.bias, self.encoder, self.encoder_bias).relu_()

    def _reconstruct(self, z_nd: Tensor) -> Tensor:
        latents_nl = self._latents(z_nd)
        if self.threshold is None:
            values_nk, which_nk = self._topk(latents_nl)
            return (
                F.embedding_bag(which_nk, self.decoder, per_sample_weights=values_nk, mode="sum") + self.bias
            )
        return (latents_nl * (latents_nl > self.threshold)) @ self.decoder + self.bias

    def _chunks(self, z_nd: Tensor) -> tuple[Tensor, ...]:
        return z_nd.split(max(SAE_FLOATS // self.latents, 64))
