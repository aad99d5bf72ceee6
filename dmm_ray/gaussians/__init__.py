"""Mixtures of Gaussians in torch: closed forms at every noise level, and fitting."""

from dmm_ray.gaussians.analysers import fit_analysers
from dmm_ray.gaussians.choice import (
    ChosenMixture,
    choose_analysers,
    choose_diagonal,
    flow_matching_loss,
)
from dmm_ray.gaussians.clusters import Clusters, find_clusters
from dmm_ray.gaussians.diagonal import fit_diagonal
from dmm_ray.gaussians.mixture import GaussianMixture, NoisedMixture
from dmm_ray.gaussians.single import fit_gaussian, mean_and_covariance

__all__ = [
    "ChosenMixture",
    "Clusters",
    "GaussianMixture",
    "NoisedMixture",
    "choose_analysers",
    "choose_diagonal",
    "find_clusters",
    "fit_analysers",
    "fit_diagonal",
    "fit_gaussian",
    "flow_matching_loss",
    "mean_and_covariance",
]
