"""Steering a language model along a direction, and bringing each edited activation back to where natural ones lie.

At every position that predicts a new token (the prompt's last one and each new one, never position 0), the layer's
output x becomes ``x + strength * norm * direction``, where norm is the layer's mean activation norm. With a level u, it
is then noised to u and denoised by the prior (Luo et al. 2026, section on steering).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.interventions.directions import Direction
from dmm_ray.prior import ActivationPrior
from dmm_ray.subject.intervention import Intervention, Site


@dataclass(frozen=True)
class Steering:
    """An edit of one layer.

    Raises:
        UserError: the prior does not model the layer, or the direction is of another layer or width.

    Example:
        >>> direction = Direction("cheerful", torch.randn(64), layer=2)
        >>> steering = Steering(prior, direction, strength=0.5, u=0.3, steps=4)
        >>> [one] = subject.generate(["Once upon a time"], [steering.intervention()], max_tokens=8)
        >>> len(one.ids) <= 8
        True
    """

    prior: ActivationPrior
    """Provides the layer's mean activation norm, and the projection."""
    direction: Direction | None
    """None to project the activation only."""
    strength: float = 0.0
    """Length of the step in mean activation norms; negative for the opposite direction."""
    u: float | None = None
    """Noise level of the projection, 0 to 1; None for no projection."""
    steps: int = 10
    """Solver steps of the projection, each with two evaluations of the prior per token."""
    layer: int | None = None
    """The block whose output is edited; None for the direction's own, or else the prior's only one."""
    seed: int = 0
    """Seed of the projection's noise; the noise at a position does not depend on what is steered."""

    def __post_init__(self) -> None:
        block, direction = self.block, self.direction
        if direction is None:
            return
        if direction.layer not in (None, block):
            raise UserError(
                f"direction: {direction.name} belongs to layer {direction.layer}, not {block}; choose another"
            )
        if len(direction.vector) != self.prior.d:
            raise UserError(
                f"direction: {len(direction.vector)} numbers; this model's activations have d = {self.prior.d}"
            )

    @cached_property
    def block(self) -> int:
        """Index of the layer."""
        own = None if self.direction is None else self.direction.layer
        return self.prior.layers[self.prior.layer_index(own if self.layer is None else self.layer)]

    @cached_property
    def norm(self) -> float:
        """The layer's mean activation norm, ``sqrt(E |x|^2) = sqrt(sum(mean^2 + var))``."""
        row, normalizer = self.prior.layer_index(self.block), self.prior.normalizer
        return float((normalizer.mean[row].double().square() + normalizer.var[row].double()).sum().sqrt())

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        """The activations (n, d) with ids (n, 2), edited; float32."""
        if self.direction is not None:
            x = x + self.strength * self.norm * self.direction.vector.to(x)
        if self.u is None:
            return x
        return self.prior.denoise(x, u=self.u, steps=self.steps, layer=self.block, ids=ids, seed=self.seed)

    def intervention(self) -> Intervention:
        """This edit at its layer, for each activation that predicts a new token."""
        return Intervention(Site(self.block), self, prompt=False)
