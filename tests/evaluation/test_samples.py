"""Frechet distance of known Gaussians; the two-sample test at both of its ends."""

import numpy as np
import pytest
import torch

from dmm_ray.evaluation.samples import frechet_distance, two_sample_auc


def gaussian(n, scale, shift=0.0, seed=0):
    return (
        torch.randn(n, len(scale), generator=torch.Generator().manual_seed(seed)) * torch.tensor(scale)
        + shift
    )


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    a, b = gaussian(200_000, [1.0, 2.0]), gaussian(200_000, [3.0, 0.5], shift=1.0, seed=1)
    assert frechet_distance(a, b) == pytest.approx(2 * 1.0 + (3 - 1) ** 2 + (2 - 0.5) ** 2, rel=0.02)


def test_frechet_distance_is_zero_for_the_same_rows_symmetric_and_free_of_rotation():
    a, b = gaussian(2_000, [1.0, 2.0, 0.1]), gaussian(2_000, [2.0, 1.0, 1.0], seed=1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2))).Q
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-4)


def test_frechet_distance_with_a_flat_direction():
    a, b = gaussian(50_000, [1.0, 0.0]), gaussian(50_000, [1.0, 1.0], seed=1)
    assert frechet_distance(a, b) == pytest.approx(1.0, rel=0.05)


def test_same_distribution_cannot_be_told_apart_and_another_can():
    docs = np.arange(600) // 6
    real, same = gaussian(600, [1.0] * 5), gaussian(600, [1.0] * 5, seed=1)
    assert two_sample_auc(real, docs, same, 600, seed=0) == pytest.approx(0.5, abs=0.08)
    assert two_sample_auc(real, docs, gaussian(600, [3.0] * 5, seed=1), 600, seed=0) > 0.85


def test_rows_of_a_document_do_not_leak_between_folds():
    docs = np.arange(400) // 40
    real = torch.randn(10, 5, generator=torch.Generator().manual_seed(0)).repeat_interleave(40, dim=0)
    fake = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
    assert two_sample_auc(real, docs, fake, 400, seed=0) < 0.9


def test_too_few_documents_give_none():
    real = gaussian(50, [1.0, 1.0])
    assert two_sample_auc(real, np.zeros(50, dtype=int), real, 50, seed=0) is None
