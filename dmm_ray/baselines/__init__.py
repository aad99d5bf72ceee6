"""Classical denoisers and densities that a prior is measured against, all in normalised space."""

from dmm_ray.baselines.base import BaselineDenoiser, Density, validation_loss
from dmm_ray.baselines.gaussian import Gaussian
from dmm_ray.baselines.mixture import Mixture, fit_best
from dmm_ray.baselines.pca import PCA
from dmm_ray.baselines.sae import SAE

__all__ = ["PCA", "SAE", "BaselineDenoiser", "Density", "Gaussian", "Mixture", "fit_best", "validation_loss"]
