"""How close each method's samples come to real rows: Frechet distance and a classifier two-sample test."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from threadpoolctl import threadpool_limits
from torch import Tensor

from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs
from dmm_ray.evaluation.methods import Methods
from dmm_ray.gaussians import mean_and_covariance
from dmm_ray.seeds import numpy_rng

FOLDS = 2


def draw(config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods) -> dict[str, Tensor]:
    """``config.samples`` normalised rows (n, d) from every method that can sample, and training rows as ``floor``."""
    n, seed, row = config.samples, config.seed, inputs.prior.layer_index(inputs.layer)
    found = {
        name: method.prior.normalizer.normalize(
            method.prior.sample(n, steps=config.sample_steps, layer=inputs.layer, seed=seed), row
        )
        for name, method in methods.priors.items()
    }
    found |= {name: method.sample(n, seed) for name, method in methods.sampled.items()}
    order = torch.from_numpy(numpy_rng(seed).permutation(len(inputs.train.z))[:n])
    found["floor"] = inputs.train.z[order.to(inputs.train.z.device)]
    return found


def frechet_distance(a_nd: Tensor, b_nd: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of rows (Dowson and Landau 1982).

    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``
    """
    (m_a, s_a), (m_b, s_b) = mean_and_covariance(a_nd), mean_and_covariance(b_nd)
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    return max(float((m_a - m_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross), 0.0)


def two_sample_auc(real_nd: Tensor, docs: np.ndarray, fake_nd: Tensor, rows: int, seed: int) -> float | None:
    """Cross-validated AUC of gradient-boosted trees that classify real rows against others; 0.5 is indistinguishable.

    Rows of a document stay in the same fold; None with fewer documents than folds.

    Args:
        real_nd: test rows (n, d).
        docs: their documents (n,).
        fake_nd: rows to distinguish from them.
        rows: maximum rows to use per side.
        seed: seed of the draw of rows and of the folds.
    """
    rng = numpy_rng(seed)
    take = [rng.permutation(len(x))[:rows] for x in (real_nd, fake_nd)]
    x = np.concatenate(
        [side.numpy(force=True)[at] for side, at in zip((real_nd, fake_nd), take, strict=True)]
    )
    if len(np.unique(docs[take[0]])) < FOLDS:
        return None
    y = np.repeat([1, 0], [len(at) for at in take])
    groups = np.concatenate([docs[take[0]], -1 - np.arange(len(take[1]))])  # each other row is its own group
    model = HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.15, early_stopping=False, random_state=seed
    )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    with threadpool_limits(
        limits=1, user_api="openmp"
    ):  # with so few rows, threads only wait for one another
        scores = cross_val_predict(model, x, y, groups=groups, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(y, scores))
