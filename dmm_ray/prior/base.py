"""The closed-form base of a prior: a mixture of Gaussians that the network only has to correct.

A prior with a base predicts ``base velocity + network``. The base's velocity and divergence are exact at every noise
level, so its share of a log-likelihood needs no trace estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.gaussians import GaussianMixture, NoisedMixture

BaseKind = Literal["none", "gaussian", "mixture", "factor_analysers"]
"""gaussian: full covariance; mixture: diagonal Gaussians in a shared basis; factor_analysers: diagonal plus factors."""
PREFIX = "base."
"""Prefix of the names of its tensors in a prior's weight file."""
LEVEL_FLOATS = 1 << 25
"""Cached tables of noise levels have at most about this many elements (128 MB)."""


def base_from_tensors(
    tensors: dict[str, Tensor], kind: BaseKind, d: int, where: str
) -> GaussianMixture | None:
    """Extract the base from the tensors of a prior; None for a prior without one.

    Args:
        tensors: tensors by name; those of the base are removed.
        kind: kind of base according to the prior's configuration.
        d: width of an activation.
        where: the file, for error messages.

    Raises:
        UserError: the base's tensors do not match the configuration or one another.
    """
    found = {
        name.removeprefix(PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)
    }
    if kind == "none":
        if found:
            raise UserError(f"{where}: contains a base, but config.json specifies none; copy the prior again")
        return None
    _check_shapes(found, d, where)
    if (found["variances"] <= 0).any() or (found["weights"] <= 0).any():
        raise UserError(f"{where}: the base's variances and weights must be positive; copy the prior again")
    return GaussianMixture(
        found["weights"], found["means"], found["variances"], found["factors"], found.get("basis")
    )


def _check_shapes(found: Mapping[str, Tensor], d: int, where: str) -> None:
    for name in ("weights", "means", "variances", "factors"):
        if name not in found:
            raise UserError(f"{where}: has no tensor {PREFIX}{name}; copy the prior again")
    k, rank = found["weights"].numel(), found["factors"].shape[1] if found["factors"].ndim == 3 else -1
    expected = {
        "weights": (k,),
        "means": (k, d),
        "variances": (k, d),
        "factors": (k, rank, d),
        "basis": (d, d),
    }
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected.get(name):
            raise UserError(
                f"{where}: {PREFIX}{name} has shape {tuple(tensor.shape)}, expected {expected.get(name)}; "
                "copy the prior again"
            )


class BaseLevels:
    """A base at the noise levels of a solver's grid: each level's tables are cached while they fit.

    Args:
        base: the mixture.
    """

    def __init__(self, base: GaussianMixture) -> None:
        self.base = base
        per_level = 3 * base.means.numel() * (1 + base.rank)
        self.remembered = max(1, LEVEL_FLOATS // per_level)
        self._known: dict[float, NoisedMixture] = {}

    def at(self, u: float) -> NoisedMixture:
        """The mixture at noise level u, cached; the least recently used level is evicted first."""
        found = self._known.pop(u, None) or self.base.at(u)
        self._known[u] = found
        if len(self._known) > self.remembered:
            self._known.pop(next(iter(self._known)), None)
        return found
