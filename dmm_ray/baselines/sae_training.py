"""Training TopK and BatchTopK autoencoders on clean rows or to restore noised ones, and tuning their options.

BatchTopK (Bussmann et al. 2024) keeps the k n largest latents of a batch of n rows; after training, a latent is active
if it exceeds the running average of the smallest latent kept per batch. In the first half of training, latents that do
not fire are pointed at the residuals of badly restored rows, as in neuron resampling (Bricken et al. 2023).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmm_ray.baselines.sae import SAE
from dmm_ray.gaussians.choice import flow_matching_loss
from dmm_ray.seeds import torch_rng

logger = logging.getLogger(__name__)
BATCH = 512
WARMUP = 0.05
HIGHEST_LEVEL = 0.7
"""Highest noise level in training: beyond it, rows divided by 1 - u would dominate the loss."""
REVIVE_EVERY = 100
"""Latents that have not fired are revived after each interval of this many batches."""
THRESHOLD_DECAY = 0.99
"""Decay of the running average of a batch's smallest kept latent."""
TRIAL_SHARE = 6
"""A trial of options sees the final training's number of samples divided by this."""
PROBE_BATCHES = 20
"""Batches timed to predict how long training takes."""
TRIALS_TIME = 0.5
"""Share of the time budget that trials may use."""
RESTORED_LEVEL = 0.5
"""Noise level at which a noise-trained autoencoder is judged."""
Kind = Literal["topk", "batch_topk"]


class SAEOptions(NamedTuple):
    """The options that are tuned."""

    latents: int
    k: int
    lr: float = 5e-3
    kind: Kind = "topk"

    def __str__(self) -> str:
        return f"{self.kind}, {self.latents} latents, k = {self.k}, lr {self.lr:g}"


class SAEGrid(NamedTuple):
    """Values to try for each option; the search starts from the first of each."""

    latents: Sequence[int]
    k: Sequence[int]
    lr: Sequence[float]
    kind: Sequence[Kind]

    @property
    def first(self) -> SAEOptions:
        """The options that the search starts from."""
        return SAEOptions(self.latents[0], self.k[0], self.lr[0], self.kind[0])


@dataclass
class TunedSAE:
    """A trained autoencoder, and how its options were chosen."""

    sae: SAE
    """Its ``seconds`` include the trials."""
    options: SAEOptions
    samples: int
    """Rows seen in training, repeats counted; fewer than requested if time did not allow more."""
    losses: dict[str, float] = field(default_factory=dict)
    """Score of each trial on validation rows, by its options."""
    left_out: int = 0
    """Number of trials skipped for lack of time."""


def tune_sae(
    z: Tensor,
    validation: Tensor,
    grid: SAEGrid,
    samples: int,
    *,
    noised: bool,
    seconds: float,
    seed: int = 0,
) -> TunedSAE:
    """Train an autoencoder with the options that do best on validation rows.

    Options are set one after the other, learning rate first, to the value that does best in a short training. The plain
    autoencoder is judged by its flow-matching loss. Since that of any reconstruction is dominated by the lowest noise
    levels, the noise-trained one is judged by its error in restoring rows from u = 0.5, as it is trained to do.

    Args:
        z: (n, d) training rows.
        validation: (m, d) rows of other documents.
        grid: values to try for each option.
        samples: rows that the final training sees, repeats counted.
        noised: train to restore noised rows.
        seconds: approximate time for trials and training.
        seed: seed of weights, order and noise.
    """
    start = time.perf_counter()
    best, losses, left_out = grid.first, {}, 0
    short = max(samples // TRIAL_SHARE, BATCH)

    def score(options: SAEOptions) -> float:
        sae = train_sae(z, options, short, noised=noised, seed=seed)
        losses[str(options)] = loss = _judge(sae, validation, noised, seed)
        logger.info("SAE, %s, %s: %.4f", "noise-trained" if noised else "plain", options, loss)
        return loss

    for name in ("lr", "k", "latents", "kind"):
        for value in getattr(grid, name)[1:]:
            if time.perf_counter() - start > TRIALS_TIME * seconds:
                left_out += 1
                continue
            if str(best) not in losses:
                score(best)
            options = best._replace(**{name: value})
            if str(options) not in losses and score(options) < losses[str(best)]:
                best = options
    if left_out:
        logger.warning("SAE: no time for %d trials of options; increase sae_minutes", left_out)
    affordable = _affordable(z, best, noised, seconds - (time.perf_counter() - start))
    if affordable < samples:
        logger.warning("SAE: time for only %d of %d samples; increase sae_minutes", affordable, samples)
    sae = train_sae(z, best, min(samples, affordable), noised=noised, seed=seed)
    sae.dead = sae.count_dead(z)
    sae.seconds = time.perf_counter() - start
    return TunedSAE(sae, best, min(samples, affordable), losses, left_out)


def train_sae(z: Tensor, options: SAEOptions, samples: int, *, noised: bool = False, seed: int = 0) -> SAE:
    """Train with Adam on ``samples`` rows drawn in shuffled passes over the training rows (n, d).

    With ``noised`` the input is ``z_u / (1 - u)`` with u uniform in [0, 0.7] and the target is z; otherwise both are z.
    """
    with torch.enable_grad():
        return _Training(z, options, max(samples // BATCH, 1), noised, seed).run()


def _affordable(z: Tensor, options: SAEOptions, noised: bool, seconds: float) -> int:
    """Number of samples that can be trained on in ``seconds``, at least as many as in the timing probe."""
    begin = time.perf_counter()
    train_sae(z, options, PROBE_BATCHES * BATCH, noised=noised)
    each = (time.perf_counter() - begin) / PROBE_BATCHES
    return BATCH * max(int(seconds / each), PROBE_BATCHES)


def _judge(sae: SAE, validation: Tensor, noised: bool, seed: int) -> float:
    if not noised:
        return flow_matching_loss(sae, validation, seed=seed)
    noise = torch.randn(validation.shape, generator=torch_rng(seed)).to(validation.device)
    z_u = (1 - RESTORED_LEVEL) * validation + RESTORED_LEVEL * noise
    return float((sae.posterior_mean(z_u, RESTORED_LEVEL) - validation).square().mean())


class _Code(NamedTuple):
    """Active latents of a batch, row by row."""

    values: Tensor
    """(m,), non-negative."""
    latents: Tensor
    """(m,), their indices."""
    starts: Tensor
    """(n,), offset at which each row begins."""


class _Training:
    """A single training run of an autoencoder."""

    def __init__(self, z: Tensor, options: SAEOptions, batches: int, noised: bool, seed: int) -> None:
        self.z, self.options, self.batches, self.noised = z, options, batches, noised
        self.generator = torch_rng(seed)
        mean = z.mean(0)
        directions = torch.randn(options.latents, len(mean), generator=self.generator).to(z)
        self.decoder = F.normalize(directions, dim=1)
        self.encoder, self.bias = self.decoder.clone(), mean.clone()
        self.encoder_bias = torch.zeros(options.latents, device=z.device)
        self.mean, self.k = mean, min(options.k, options.latents)
        self.weights = [self.encoder, self.encoder_bias, self.decoder, self.bias]
        for weight in self.weights:
            weight.requires_grad_()
        self.optimizer = torch.optim.Adam(self.weights, lr=options.lr, betas=(0.9, 0.99))
        self.smallest: float | None = None

    def run(self) -> SAE:
        """Train for all batches and return the autoencoder."""
        fired_l = torch.zeros(self.options.latents, dtype=torch.bool, device=self.z.device)
        for step, target in enumerate(self._targets()):
            done = step / self.batches
            warm, falling = (step + 1) / (WARMUP * self.batches + 1), (1 - done) / 0.8
            self.optimizer.param_groups[0]["lr"] = self.options.lr * min(warm, falling, 1)
            code, error = self._step(target)
            with torch.no_grad():
                fired_l[code.latents[code.values > 0]] = True
                if (step + 1) % REVIVE_EVERY == 0:
                    if done < 0.5:
                        self._revive(~fired_l, error)
                    fired_l.zero_()
                self.decoder.copy_(F.normalize(self.decoder, dim=1))
        for weight in self.weights:
            weight.requires_grad_(False)
        threshold = None
        if self.options.kind == "batch_topk":
            threshold = torch.full_like(self.encoder_bias, self.smallest or 0.0)
        return SAE(self.encoder, self.encoder_bias, self.decoder, self.bias, self.mean, self.k, threshold)

    def _targets(self) -> Iterator[Tensor]:
        """Batches of rows in shuffled passes."""
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.batches):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(self.z), generator=self.generator)])
            yield self.z[order[:BATCH].to(self.z.device)]
            order = order[BATCH:]

    def _step(self, target: Tensor) -> tuple[_Code, Tensor]:
        """Take one optimiser step; return the batch's code and its errors (n, d)."""
        source = noisy_view(target, self.generator) if self.noised else target
        code = self._encode(source)
        restored = F.embedding_bag(
            code.latents, self.decoder, code.starts, per_sample_weights=code.values, mode="sum"
        )
        error = restored + self.bias - target
        self.optimizer.zero_grad(set_to_none=True)
        error.square().sum(1).mean().backward()
        self.optimizer.step()
        return code, error.detach()

    def _encode(self, source: Tensor) -> _Code:
        latents_nl = F.linear(source - self.bias, self.encoder, self.encoder_bias)
        n, width = latents_nl.shape
        if self.options.kind == "topk":
            values_nk, which_nk = latents_nl.topk(self.k, dim=1, sorted=False)
            starts = torch.arange(0, n * self.k, self.k, device=source.device)
            return _Code(values_nk.relu().flatten(), which_nk.flatten(), starts)
        at = latents_nl.detach().flatten().topk(n * self.k, sorted=False).indices.sort().values
        values = latents_nl.flatten()[at].relu()
        counts = torch.bincount(at // width, minlength=n)
        self._note_smallest(values.detach())
        return _Code(values, at % width, counts.cumsum(0) - counts)

    def _note_smallest(self, values: Tensor) -> None:
        positive = values[values > 0]
        if len(positive):
            least = float(positive.min())
            decay = 0.0 if self.smallest is None else THRESHOLD_DECAY
            self.smallest = decay * (self.smallest or 0.0) + (1 - decay) * least

    def _revive(self, dead_l: Tensor, error: Tensor) -> None:
        """Point dead latents at the residuals of the worst restored rows of the batch."""
        dead = dead_l.nonzero()[:, 0][: len(error)]
        worst = error.square().sum(1).topk(len(dead)).indices
        directions = F.normalize(-error[worst], dim=1)
        self.decoder[dead] = directions
        self.encoder[dead] = directions
        self.encoder_bias[dead] = 0
        for weight in (self.encoder, self.encoder_bias, self.decoder):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment][dead] = 0


def noisy_view(z: Tensor, generator: torch.Generator) -> Tensor:
    """``z_u / (1 - u) = z + noise * u / (1 - u)`` of rows (n, d), each with its own u in [0, HIGHEST_LEVEL]."""
    u_n1 = torch.rand(len(z), 1, generator=generator).to(z.device) * HIGHEST_LEVEL
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    return z + noise * (u_n1 / (1 - u_n1))
