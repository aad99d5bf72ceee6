"""The diffusion meta-model itself: network, flow, likelihood, denoising, sampling.

Independent of Ray and of language models.
"""

from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.likelihood import LogProb
from dmm_ray.prior.model import ActivationPrior
from dmm_ray.prior.solver import Solver

__all__ = ["ActivationPrior", "LogProb", "PriorConfig", "Solver"]
