"""Classical denoisers and densities that a prior is measured against, all in normalised space.

Mixtures are in :mod:`dmm_ray.gaussians`.
"""

from dmm_ray.baselines.base import BaselineDenoiser, Density
from dmm_ray.baselines.gaussian import Gaussian
from dmm_ray.baselines.pca import PCA
from dmm_ray.baselines.sae import SAE
from dmm_ray.baselines.sae_pretrained import load_sae
from dmm_ray.baselines.sae_training import SAEGrid, SAEOptions, TunedSAE, train_sae, tune_sae

__all__ = [
    "PCA",
    "SAE",
    "BaselineDenoiser",
    "Density",
    "Gaussian",
    "SAEGrid",
    "SAEOptions",
    "TunedSAE",
    "load_sae",
    "train_sae",
    "tune_sae",
]
