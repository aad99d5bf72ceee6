"""Per-dimension standardisation of activations, per layer, with a single explicit variance floor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """``z = (x - mean) / sqrt(max(var, floor))``.

    Args:
        mean: (L, d), one row per modelled layer.
        var: (L, d).
        floor: lower bound of every variance, in squared activation units.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.warned: set[int] = set()
        """Indices of layers for which a warning about rows far from natural ones was logged: one is enough."""
        self.register_buffer("mean", mean.to(torch.float32))
        self.register_buffer("var", var.to(torch.float32).clamp(min=floor))

    def normalize(self, x: Tensor, layer_index: int = 0) -> Tensor:
        """Normalise raw activations (n, d) of the layer at index ``layer_index``; float32."""
        return (x.to(torch.float32) - self.mean[layer_index]) / self.var[layer_index].sqrt()

    def denormalize(self, z: Tensor, layer_index: int = 0) -> Tensor:
        """The inverse of :meth:`normalize`, float32."""
        return z * self.var[layer_index].sqrt() + self.mean[layer_index]

    def log_determinant(self, layer_index: int = 0) -> float:
        """``log |dz / dx|`` in nats: add it to a log-density of z to get that of x."""
        return float(-0.5 * self.var[layer_index].double().log().sum())


def variance_floor(var: Tensor) -> float:
    """The floor used for new priors: a millionth of the mean variance, so that dead dimensions stay finite."""
    return max(float(var.double().mean()) * 1e-6, 1e-30)
