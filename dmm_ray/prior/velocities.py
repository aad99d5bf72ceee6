"""The denoiser as a velocity field at one layer: its number format, cached time path and compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmm_ray.gaussians import GaussianMixture
from dmm_ray.precision import Precision
from dmm_ray.prior.base import BaseLevels
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.precision import as_asked
from dmm_ray.prior.weights import sampled

GATE_FLOATS = 1 << 24
"""Cached time paths have at most about this many elements."""
Key = tuple[int, float]


class _Network(NamedTuple):
    """The denoiser in one number format, its functions compiled or not."""

    dtype: torch.dtype
    gates: Callable[..., list[Tensor]]
    velocity: Callable[..., Tensor]
    tangents: Callable[..., tuple[Tensor, Tensor]]
    hidden: Callable[..., list[Tensor]]


class Velocities:
    """Makes a prior's velocity fields; its caches are dropped when the weights move or change.

    Moves, casts and every in-place change that torch counts as a version are detected. Writes through ``.data``, which
    torch does not count, are detected on a sample of each tensor's elements: a change of a whole tensor is noticed, an
    edit of a few elements may not be. (A sum over all elements would cost as much as an evaluation of the network.)

    Args:
        config: the prior's configuration.
    """

    def __init__(self, config: PriorConfig) -> None:
        self.config = config
        self.options: dict[str, Any] | None = None
        self._weights: tuple[tuple[int, int], ...] = ()
        self._samples: list[Tensor] = []  # views of some elements of each weight
        self._numbers: Tensor | None = None  # their values when last checked
        self._levels: BaseLevels | None = None
        self._networks: dict[Precision, _Network] = {}
        self._gates: dict[Precision, dict[Key, list[Tensor]]] = {}

    def compile(self, options: dict[str, Any]) -> None:
        """Compile the networks from now on, with ``options`` of torch.compile."""
        self.options, self._weights = options, ()

    def field(
        self,
        denoiser: Denoiser,
        layer_index: int,
        precision: Precision = "float32",
        base: GaussianMixture | None = None,
    ) -> VelocityField:
        """The velocity field of the network, plus that of the base if any, at the layer with index ``layer_index``."""
        # In-place updates increment the version; a move or a cast changes the address. Weights that were loaded in
        # inference mode have no version, but nothing outside that mode can write to them.
        held = [*denoiser.parameters(), *(base.buffers() if base is not None else ())]
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in held)
        if weights != self._weights or self._written():
            self._weights, self._networks, self._gates = weights, {}, {}
            self._samples = [sampled(p) for p in held if p.numel() and p.is_contiguous()]
            self._levels = None if base is None else BaseLevels(base)
            self._numbers = torch.cat(self._samples)
        if precision not in self._networks:
            self._networks[precision] = self._network(denoiser, precision)
        depth = self.config.depth(self.config.layers[layer_index]) if self.config.multi_layer else None
        known = self._gates.setdefault(precision, {})
        return VelocityField(
            self._networks[precision], layer_index, depth, known, self._remembered, self._levels
        )

    def _written(self) -> bool:
        """Whether a sampled element has changed."""
        return self._numbers is not None and not torch.equal(torch.cat(self._samples), self._numbers)

    @property
    def _remembered(self) -> int:
        return max(8, GATE_FLOATS // (self.config.n_blocks * self.config.d_mlp))

    def _network(self, denoiser: Denoiser, precision: Precision) -> _Network:
        if precision == "bfloat16":
            denoiser = copy.deepcopy(denoiser).to(torch.bfloat16)
        velocity, tangents = denoiser.velocity, denoiser.tangents
        if self.options is not None:
            velocity = _fresh(torch.compile(velocity, **self.options))
            tangents = _fresh(torch.compile(tangents, **self.options))
        dtype = denoiser.in_proj.weight.dtype
        return _Network(dtype, denoiser.gates, velocity, tangents, denoiser.meta_neurons)


class VelocityField:
    """``v(z, u) = E[noise - z | z_u]`` at one layer, on normalised rows (n, d); results in the dtype of z.

    Args:
        network: the denoiser's functions.
        layer_index: index of the layer among the prior's.
        depth: its layer condition, if the prior has one.
        known: cached time paths by (layer_index, u), shared by a prior's fields; least recently used evicted first.
        remembered: most time paths to keep.
        base: the closed-form velocity that the network corrects.
    """

    def __init__(
        self,
        network: _Network,
        layer_index: int,
        depth: float | None,
        known: dict[Key, list[Tensor]],
        remembered: int,
        base: BaseLevels | None = None,
    ) -> None:
        self.network, self.layer_index, self.depth = network, layer_index, depth
        self.known, self.remembered, self.base = known, remembered, base

    def __call__(self, z: Tensor, u: float) -> Tensor:
        """The velocity (n, d) of rows at one noise level."""
        with as_asked(z.device):
            v = self.network.velocity(z.to(self.network.dtype), self._path(u, z.device)).to(z.dtype)
            return v if self.base is None else v + self.base.at(u).velocity(z)

    def network_tangents(self, z: Tensor, u: float, t_KND: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own output (n, d), without the base, and its derivatives along t (K, n, d)."""
        dtype = self.network.dtype
        with as_asked(z.device):
            v, along = self.network.tangents(z.to(dtype), self._path(u, z.device), t_KND.to(dtype))
        return v.to(z.dtype), along.to(z.dtype)

    def hidden(self, z: Tensor, u: float) -> list[Tensor]:
        """Every block's hidden units (n, d_mlp)."""
        with as_asked(z.device):
            found = self.network.hidden(z.to(self.network.dtype), self._path(u, z.device))
        return [h.to(z.dtype) for h in found]

    def at_levels(self, z: Tensor, u_N: Tensor) -> Tensor:
        """The velocity (n, d) of rows with one noise level per row, u (n,)."""
        u_M, index = torch.unique(u_N, return_inverse=True)
        with as_asked(z.device):
            gates = self._new_path(u_M)
            found = self.network.velocity(z.to(self.network.dtype), gates, index if len(u_M) > 1 else None)
            found = found.to(z.dtype)
            return found if self.base is None else found + self.base.base.velocity(z, u_N)

    def _path(self, u: float, device: torch.device) -> list[Tensor]:
        gates = self.known.pop((self.layer_index, u), None)
        if gates is None:
            gates = self._new_path(torch.full((1,), u, device=device))
        self.known[self.layer_index, u] = gates
        if len(self.known) > self.remembered:
            self.known.pop(next(iter(self.known)), None)
        return gates

    def _new_path(self, u_M: Tensor) -> list[Tensor]:
        depth = None if self.depth is None else torch.full_like(u_M, self.depth)
        return self.network.gates(u_M, depth)


def _fresh(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the results of a compiled function: CUDA graphs overwrite those of the previous call."""

    def call(*args: Any) -> Any:
        found = compiled(*args)
        return found.clone() if isinstance(found, Tensor) else tuple(t.clone() for t in found)

    return call
