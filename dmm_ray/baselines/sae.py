"""A TopK sparse autoencoder (Gao et al. 2024), trained to reconstruct clean rows or to denoise."""

from __future__ import annotations

import time
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dmm_ray.baselines.base import levels_of, velocity_from_mean
from dmm_ray.seeds import torch_rng

BATCH = 512
PEAK_LR = 5e-3
WARMUP = 0.05
HIGHEST_LEVEL = 0.7
"""Noise levels above this are not trained on: there, rows divided by 1 - u would drown out all others."""
REVIVE_EVERY = 100
"""In the first half of training, every this many batches, latents that have not fired are pointed at the rows with the
largest errors."""
SAE_CHUNK = 16384


class SAE:
    """``x0 = D topk(relu(E (z - b) + c)) + b``, where the rows of D (latents, d) have unit norm.

    As a denoiser, its input is ``z_u / (1 - u)``, an unbiased view of the clean row; at u = 1, where no signal is left,
    it returns the mean.
    """

    def __init__(self, mean_d: Tensor, latents: int, k: int, seed: int = 0) -> None:
        generator = torch_rng(seed)
        directions_ld = F.normalize(torch.randn(latents, len(mean_d), generator=generator), dim=1).to(
            mean_d.device
        )
        self.k = min(k, latents)
        self.mean = mean_d.float()
        self.bias = self.mean.clone()
        self.decoder = directions_ld
        self.encoder = directions_ld.clone()
        self.threshold = torch.zeros(latents, device=mean_d.device)
        self.seconds = 0.0
        self.n_parameters = sum(p.numel() for p in self._weights())

    def _weights(self) -> list[Tensor]:
        return [self.encoder, self.threshold, self.decoder, self.bias]

    @classmethod
    def fit(
        cls, z_nd: Tensor, *, latents: int, k: int, samples: int, noised: bool = False, seed: int = 0
    ) -> Self:
        """Train with Adam on ``samples`` rows drawn in shuffled passes over the training rows (n, d).

        If ``noised``, the input is ``z_u / (1 - u)`` with u uniform in [0, 0.7] and the target is z; else both are z.
        """
        start = time.perf_counter()
        model = cls(z_nd.mean(0), latents, k, seed)
        with torch.enable_grad():
            model._train(z_nd, samples, noised, torch_rng(seed))
        model.seconds = time.perf_counter() - start
        return model

    def _train(self, z_nd: Tensor, samples: int, noised: bool, generator: torch.Generator) -> None:
        weights = [w.requires_grad_() for w in self._weights()]
        optimizer = torch.optim.Adam(weights, lr=PEAK_LR, betas=(0.9, 0.99))
        batches = max(samples // BATCH, 1)
        fired_l = torch.zeros(len(self.threshold), dtype=torch.bool, device=z_nd.device)
        order_n = torch.empty(0, dtype=torch.int64)
        for step in range(batches):
            if len(order_n) < BATCH:
                order_n = torch.cat([order_n, torch.randperm(len(z_nd), generator=generator)])
            target_nd = z_nd[order_n[:BATCH].to(z_nd.device)]
            order_n = order_n[BATCH:]
            source_nd = noisy_view(target_nd, generator) if noised else target_nd
            done = step / batches
            optimizer.param_groups[0]["lr"] = PEAK_LR * min(
                (step + 1) / (WARMUP * batches + 1), (1 - done) / 0.8, 1
            )
            values_nk, which_nk = self._encode(source_nd)
            error_nd = self._decode(values_nk, which_nk) - target_nd
            optimizer.zero_grad(set_to_none=True)
            error_nd.square().sum(1).mean().backward()
            optimizer.step()
            with torch.no_grad():
                fired_l[which_nk[values_nk > 0]] = True
                if (step + 1) % REVIVE_EVERY == 0:
                    if done < 0.5:
                        self._revive(~fired_l, target_nd, error_nd, optimizer)
                    fired_l.zero_()
                self.decoder.copy_(F.normalize(self.decoder, dim=1))
        for weight in weights:
            weight.requires_grad_(False)

    def _revive(
        self, dead_l: Tensor, target_nd: Tensor, error_nd: Tensor, optimizer: torch.optim.Adam
    ) -> None:
        """Point dead latents at the residuals of the batch's worst-restored rows."""
        dead = dead_l.nonzero()[:, 0][: len(error_nd)]
        worst = error_nd.square().sum(1).topk(len(dead)).indices
        directions = F.normalize(-error_nd[worst], dim=1)
        self.decoder[dead] = directions
        self.encoder[dead] = directions
        self.threshold[dead] = 0
        for weight in (self.encoder, self.threshold, self.decoder):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][moment][dead] = 0

    def _encode(self, z_nd: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest latents of each row after the ReLU, and their indices, (n, k) each."""
        values_nk, which_nk = F.linear(z_nd - self.bias, self.encoder, self.threshold).topk(
            self.k, dim=1, sorted=False
        )
        return values_nk.relu(), which_nk

    def _decode(self, values_nk: Tensor, which_nk: Tensor) -> Tensor:
        return F.embedding_bag(which_nk, self.decoder, per_sample_weights=values_nk, mode="sum") + self.bias

    def reconstruct(self, z_nd: Tensor) -> Tensor:
        """The plain reconstruction (n, d) of rows."""
        return torch.cat([self._decode(*self._encode(chunk)) for chunk in z_nd.split(SAE_CHUNK)])

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``SAE(z_u / (1 - u))``; the mean at u = 1."""
        left_n1 = 1 - levels_of(u_n, len(z_nd), z_nd.device)[:, None]
        return torch.where(left_n1 > 0, self.reconstruct(z_nd / left_n1.clamp_min(1e-6)), self.mean)

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``(z_u - x0) / u``: whatever the reconstruction leaves out counts as noise."""
        return velocity_from_mean(z_nd, self.posterior_mean(z_nd, u_n), u_n)


def noisy_view(z_nd: Tensor, generator: torch.Generator) -> Tensor:
    """``z_u / (1 - u) = z + noise * u / (1 - u)`` with u uniform in [0, HIGHEST_LEVEL], one level per row."""
    u_n1 = torch.rand(len(z_nd), 1, generator=generator).to(z_nd.device) * HIGHEST_LEVEL
    noise_nd = torch.randn(z_nd.shape, generator=generator).to(z_nd.device)
    return z_nd + noise_nd * (u_n1 / (1 - u_n1))
