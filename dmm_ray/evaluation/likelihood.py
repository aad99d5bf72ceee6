"""Negative log-likelihood of test rows, in nats per dimension."""

from __future__ import annotations

import numpy as np

from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs, EvaluationRows
from dmm_ray.evaluation.methods import Methods


def nll(
    config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods, part: EvaluationRows
) -> dict[str, np.ndarray]:
    """``-log p(x) / d`` of raw activations, (n,) float64, for the prior and every baseline with a density.

    Add :func:`log_determinant_per_dim` to obtain the value for normalised rows.
    """
    row = inputs.prior.layer_index(inputs.layer)
    prior = inputs.prior.log_prob(
        inputs.prior.normalizer.denormalize(part.z, row),
        layer=inputs.layer,
        steps=config.nll_steps,
        probes=config.nll_probes,
        ids=part.ids,
        seed=config.seed,
    )
    found = {"prior": -prior.nats.double().numpy(force=True) / inputs.prior.d}
    for name, method in methods.densities.items():
        normalised = -method.log_prob(part.z).double().numpy(force=True) / inputs.prior.d
        found[name] = normalised - log_determinant_per_dim(inputs)
    return found


def log_determinant_per_dim(inputs: EvaluationInputs) -> float:
    """The normaliser's ``log |dz/dx| / d``: ``log p(x) / d`` minus ``log p(z) / d``."""
    return inputs.prior.normalizer.log_determinant(inputs.prior.layer_index(inputs.layer)) / inputs.prior.d
