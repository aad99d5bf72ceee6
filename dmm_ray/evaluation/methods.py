"""The methods under comparison, fitted on training rows and chosen on validation rows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmm_ray.baselines import (
    PCA,
    SAE,
    BaselineDenoiser,
    Density,
    Gaussian,
    SAEGrid,
    TunedSAE,
    load_sae,
    tune_sae,
)
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs, EvaluationRows
from dmm_ray.gaussians import ChosenMixture, GaussianMixture, choose_analysers, choose_diagonal
from dmm_ray.prior import ActivationPrior
from dmm_ray.prior.flow import posterior_mean

logger = logging.getLogger(__name__)
KEYS = ("prior", "gaussian", "pca", "mixture", "factor_analysers", "sae", "untrained")
"""The methods of every report. The autoencoder is the better of two, ``sae_plain`` and ``sae_noised``."""
SAE_VARIANTS = ("sae_plain", "sae_noised")
PRETRAINED_SAE = "sae_pretrained"
"""One more method, where the user gives one."""
LATENTS_PER_DIM = (16, 8, 32)
METHOD_CHUNK = 8192


class PriorDenoiser:
    """A prior at one layer as a :class:`~dmm_ray.baselines.Denoiser` in normalised space."""

    seconds = 0.0

    def __init__(self, prior: ActivationPrior, layer: int) -> None:
        self.prior = prior
        self.layer = layer
        network = sum(p.numel() for p in prior.denoiser.parameters())
        base = prior.base
        self.n_parameters = network + (base.n_parameters if base is not None else 0)
        self.flops_per_row = 2 * network + (base.flops_per_row if base is not None else 0)

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


class Sampled(Protocol):
    """A baseline that rows can be drawn from."""

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n`` normalised rows (n, d)."""
        ...


@dataclass
class Methods:
    """Fitted denoisers, and how they were chosen."""

    prior: PriorDenoiser
    untrained: PriorDenoiser
    gaussian: Gaussian
    pca: PCA
    mixture: ChosenMixture
    factor_analysers: ChosenMixture
    sae_plain: TunedSAE
    sae_noised: TunedSAE
    sae_pretrained: SAE | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The methods of the report: ``KEYS``, and the pretrained autoencoder where there is one."""
        return KEYS if self.sae_pretrained is None else (*KEYS, PRETRAINED_SAE)

    @property
    def denoisers(self) -> dict[str, BaselineDenoiser]:
        """Every method by name, with ``SAE_VARIANTS`` in the place of ``sae``."""
        return {
            **self.priors,
            "gaussian": self.gaussian,
            "pca": self.pca,
            **self.mixtures,
            **self.saes,
        }

    @property
    def priors(self) -> dict[str, PriorDenoiser]:
        """The prior and its untrained twin."""
        return {"prior": self.prior, "untrained": self.untrained}

    @property
    def mixtures(self) -> dict[str, GaussianMixture]:
        """Those of diagonal Gaussians and of factor analysers."""
        return {"mixture": self.mixture.mixture, "factor_analysers": self.factor_analysers.mixture}

    @property
    def saes(self) -> dict[str, SAE]:
        """Every autoencoder."""
        own = {"sae_plain": self.sae_plain.sae, "sae_noised": self.sae_noised.sae}
        return own if self.sae_pretrained is None else {**own, PRETRAINED_SAE: self.sae_pretrained}

    @property
    def densities(self) -> dict[str, Density]:
        """The baselines with a log-density in d dimensions."""
        return {"gaussian": self.gaussian, **self.mixtures}

    @property
    def sampled(self) -> dict[str, Sampled]:
        """The baselines that rows can be drawn from."""
        return {"gaussian": self.gaussian, "pca": self.pca, **self.mixtures}

    def about(self) -> dict[str, dict[str, object]]:
        """Size, cost, fitting time and choice of each method; the prior's training time is in its own folder."""
        notes: dict[str, dict[str, object]] = {
            "pca": {"components": self.pca.components},
            "mixture": _about_mixture(self.mixture),
            "factor_analysers": _about_mixture(self.factor_analysers),
            **{name: {"latents": sae.latents, "k": sae.k} for name, sae in self.saes.items()},
        }
        for name, tuned in (("sae_plain", self.sae_plain), ("sae_noised", self.sae_noised)):
            notes[name] |= _about_sae(tuned)
        return {
            name: {
                "parameters": m.n_parameters,
                "flops_per_row": m.flops_per_row,
                "seconds": round(m.seconds, 2),
                **notes.get(name, {}),
            }
            for name, m in self.denoisers.items()
        }


def _about_mixture(chosen: ChosenMixture) -> dict[str, object]:
    mixture = chosen.mixture
    return {
        "components": mixture.components,
        "rank": mixture.rank,
        "rotated": mixture.basis is not None,
        "variance_floor": chosen.floor,
        "validation_loss_by_size": chosen.losses,
        "components_lowered_to": chosen.lowered,
    }


def _about_sae(tuned: TunedSAE) -> dict[str, object]:
    return {
        "kind": tuned.options.kind,
        "lr": tuned.options.lr,
        "samples": tuned.samples,
        "dead_latents": tuned.sae.dead,
        "validation_by_options": tuned.losses,
        "trials_left_out": tuned.left_out,
    }


def fit(config: EvaluateConfig, inputs: EvaluationInputs) -> Methods:
    """Fit every baseline on the training rows; sizes and options are chosen on the validation rows.

    Raises:
        UserError: a pretrained autoencoder that cannot be read.
    """
    train, validation = inputs.train.z, inputs.validation.z
    start = time.perf_counter()
    pretrained = None
    if config.pretrained_sae is not None:
        normalizer, row = inputs.prior.normalizer, inputs.prior.layer_index(inputs.layer)
        pretrained = load_sae(config.pretrained_sae, normalizer.mean[row], normalizer.var[row].sqrt())
    plain, noised = (_fit_sae(config, inputs, noised) for noised in (False, True))
    methods = Methods(
        prior=PriorDenoiser(inputs.prior, inputs.layer),
        untrained=PriorDenoiser(untrained_twin(inputs.prior, config.seed), inputs.layer),
        gaussian=Gaussian.fit(train),
        pca=PCA.fit(train),
        mixture=choose_diagonal(
            train, validation, config.mixture_sizes, config.seed, own_axes=not config.quick
        ),
        factor_analysers=choose_analysers(
            train, validation, config.analyser_sizes, config.analyser_ranks, config.seed
        ),
        sae_plain=plain,
        sae_noised=noised,
        sae_pretrained=pretrained,
    )
    logger.info("baselines fitted on %d rows in %.1f s", len(train), time.perf_counter() - start)
    return methods


def _fit_sae(config: EvaluateConfig, inputs: EvaluationInputs, noised: bool) -> TunedSAE:
    shares = LATENTS_PER_DIM[:1] if config.quick else LATENTS_PER_DIM
    widths = config.sae_latents or tuple(share * inputs.prior.d for share in shares)
    return tune_sae(
        inputs.train.z,
        inputs.validation.z,
        SAEGrid(widths, config.sae_k, config.sae_lr, config.sae_kinds),
        config.sae_samples,
        noised=noised,
        seconds=30 * config.sae_minutes,
        seed=config.seed,
    )


def untrained_twin(prior: ActivationPrior, seed: int) -> ActivationPrior:
    """A prior with the same shape and normaliser but random weights and no base."""
    statistics = prior.normalizer
    alone = prior.config.model_copy(update={"base": "none"})
    twin = ActivationPrior.untrained(alone, statistics.mean.cpu(), statistics.var.cpu(), seed)
    twin.precision = prior.precision
    return twin.to(prior.device)


def subset(part: EvaluationRows, n: int) -> EvaluationRows:
    """``n`` rows evenly spaced over a part, or all of its rows if it has fewer."""
    at = torch.linspace(0, len(part.z) - 1, min(n, len(part.z)), device=part.z.device).round().long()
    return EvaluationRows(part.z[at], part.ids[at])
