"""The methods under comparison, fitted on training rows and chosen on validation rows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmm_ray.baselines import PCA, SAE, BaselineDenoiser, Density, Gaussian, Mixture, fit_best
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs, EvaluationRows
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.flow import posterior_mean

logger = logging.getLogger(__name__)
KEYS = ("prior", "gaussian", "pca", "mixture", "sae", "untrained")
"""The methods in the report; ``sae`` is the better of ``sae_plain`` and ``sae_noised``."""
SAE_VARIANTS = ("sae_plain", "sae_noised")
LATENTS_PER_DIM = 16
METHOD_CHUNK = 8192


class PriorDenoiser:
    """A prior at one layer as a :class:`~dmm_ray.baselines.Denoiser` in normalised space."""

    seconds = 0.0

    def __init__(self, prior: ActivationPrior, layer: int) -> None:
        self.prior = prior
        self.layer = layer
        self.n_parameters = sum(p.numel() for p in prior.denoiser.parameters())

    def velocity(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """The network's velocity (n, d), computed in chunks of rows."""
        u = torch.as_tensor(u_n, dtype=torch.float32, device=z_nd.device)
        levels = u.split(METHOD_CHUNK) if u.ndim else [u] * -(-len(z_nd) // METHOD_CHUNK)
        parts = [
            self.prior.velocity(z, v, self.layer)
            for z, v in zip(z_nd.split(METHOD_CHUNK), levels, strict=True)
        ]
        return torch.cat(parts)

    def posterior_mean(self, z_nd: Tensor, u_n: Tensor | float) -> Tensor:
        """``z_u - u v(z_u, u)`` (n, d)."""
        return posterior_mean(z_nd, self.velocity(z_nd, u_n), u_n)


@dataclass
class Methods:
    """Fitted denoisers by name (``KEYS`` with ``SAE_VARIANTS`` in place of ``sae``), and information on the fits."""

    prior: PriorDenoiser
    untrained: PriorDenoiser
    gaussian: Gaussian
    pca: PCA
    mixture: Mixture
    sae_plain: SAE
    sae_noised: SAE
    mixture_losses: dict[int, float] = field(default_factory=dict)

    @property
    def denoisers(self) -> dict[str, BaselineDenoiser]:
        """Every method."""
        return {
            **self.priors,
            "gaussian": self.gaussian,
            "pca": self.pca,
            "mixture": self.mixture,
            **self.saes,
        }

    @property
    def priors(self) -> dict[str, PriorDenoiser]:
        """The prior and its untrained twin."""
        return {"prior": self.prior, "untrained": self.untrained}

    @property
    def saes(self) -> dict[str, SAE]:
        """Both autoencoders."""
        return {"sae_plain": self.sae_plain, "sae_noised": self.sae_noised}

    @property
    def densities(self) -> dict[str, Density]:
        """The baselines with a log-density in d dimensions."""
        return {"gaussian": self.gaussian, "mixture": self.mixture}

    def about(self) -> dict[str, dict[str, object]]:
        """Size and fitting time of each method; the prior's training time is in its folder."""
        notes: dict[str, dict[str, object]] = {
            "pca": {"components": self.pca.components},
            "mixture": {
                "components": self.mixture.components,
                "validation_loss_by_size": {str(k): v for k, v in self.mixture_losses.items()},
            },
            **{name: {"latents": len(sae.threshold), "k": sae.k} for name, sae in self.saes.items()},
        }
        return {
            name: {"parameters": m.n_parameters, "seconds": round(m.seconds, 2), **notes.get(name, {})}
            for name, m in self.denoisers.items()
        }


def fit(config: EvaluateConfig, inputs: EvaluationInputs) -> Methods:
    """Fit every baseline on the training rows, and choose the mixture's size on the validation rows."""
    train, d = inputs.train.z, inputs.prior.d
    start = time.perf_counter()
    gaussian, pca = Gaussian.fit(train), PCA.fit(train)
    mixture, losses = fit_best(train, inputs.validation.z, config.mixture_sizes, config.seed)
    latents = config.sae_latents or LATENTS_PER_DIM * d
    plain, noised = (
        SAE.fit(
            train,
            latents=latents,
            k=config.sae_k,
            samples=config.sae_samples,
            noised=noised,
            seed=config.seed,
        )
        for noised in (False, True)
    )
    logger.info("baselines fitted on %d rows in %.1f s", len(train), time.perf_counter() - start)
    return Methods(
        prior=PriorDenoiser(inputs.prior, inputs.layer),
        untrained=PriorDenoiser(untrained_twin(inputs.prior, config.seed), inputs.layer),
        gaussian=gaussian,
        pca=pca,
        mixture=mixture,
        sae_plain=plain,
        sae_noised=noised,
        mixture_losses=losses,
    )


def untrained_twin(prior: ActivationPrior, seed: int) -> ActivationPrior:
    """A prior with the same shape and normaliser but random weights."""
    statistics = prior.normalizer
    twin = ActivationPrior.untrained(prior.config, statistics.mean.cpu(), statistics.var.cpu(), seed)
    twin.precision = prior.precision
    return twin.to(prior.device)


def subset(part: EvaluationRows, n: int) -> EvaluationRows:
    """``n`` rows evenly spaced over a part, or all of its rows if it has fewer."""
    at = torch.linspace(0, len(part.z) - 1, min(n, len(part.z)), device=part.z.device).round().long()
    return EvaluationRows(part.z[at], part.ids[at])
