"""The prior a user holds: likelihood, denoising, sampling, encoding of raw activations; saved as a folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.prior import folder
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.flow import interpolate, posterior_mean
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.noise import normal, row_ids
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.prior.solver import check_level, cosine_grid, integrate, integrate_with_trace
from dmm_ray.prior.trace import exact_trace, hutchinson_trace

Ids = Tensor | np.ndarray | None
CHUNK_FLOATS = 1 << 24
"""Rows are worked through in pieces whose widest intermediate holds about this many numbers (64 MB)."""
EXACT_TRACE_MAX_D = 512
"""Up to this width ``probes=0`` is allowed: its cost grows with d forward passes an evaluation."""
STREAM_PATH, STREAM_SAMPLE, STREAM_ENCODE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class LogProb:
    """Log-likelihood of n raw activations and its parts; tensors are (n,) float32, in nats."""

    nats: Tensor
    """log p(x), the normaliser's log-determinant included: base + divergence + log_determinant."""
    nats_per_dim: Tensor
    """``nats / d``."""
    stderr: Tensor | None
    """Standard error of ``nats`` that the trace estimate brings; zero when exact, None from a single probe."""
    percentile: Tensor | None
    """Share of natural activations less likely than this one; None for a prior without calibration."""
    latent_percentile: Tensor | None
    """Two-sided percentile of the latent norm at u = 1; None for a prior without calibration."""
    base: Tensor
    """log N(z_1; 0, I) of the latent that the row flows to."""
    divergence: Tensor
    """Integral over u of the velocity's divergence along the path."""
    log_determinant: float
    """log |dz/dx| of the normaliser."""
    evaluations: int
    """Network evaluations spent on each row, traces not counted."""


class ActivationPrior(nn.Module):
    """A diffusion meta-model of one language model's residual-stream activations.

    All methods take and give *raw* activations (n, d) and run in the dtype of the weights (float32 as loaded). A row's
    result depends on the row, its id, the arguments and ``seed`` alone, to float tolerance.

    Args of every method: ``layer`` is the block number the rows come from (required for a multi-layer prior); ``ids``
    names rows for the noise, (n,) or (n, 2) integers (default 0..n-1); ``seed`` is any integer.
    """

    def __init__(self, config: PriorConfig, denoiser: Denoiser, normalizer: Normalizer) -> None:
        super().__init__()
        self.config = config
        self.denoiser = denoiser
        self.normalizer = normalizer
        self.eval()
        self.requires_grad_(False)

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.config.d

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers this prior models."""
        return self.config.layers

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are moved there."""
        return self.denoiser.in_proj.weight.device

    @classmethod
    def untrained(cls, config: PriorConfig, mean: Tensor, var: Tensor, seed: int = 0) -> ActivationPrior:
        """A prior with random weights, from per-layer statistics mean and var, (d,) or (L, d)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = new_denoiser(config)
        shape = (len(config.layers), config.d)
        normalizer = Normalizer(mean.reshape(shape), var.reshape(shape), config.variance_floor)
        return cls(config, denoiser, normalizer)

    @classmethod
    def from_pretrained(
        cls, source: str, device: str = "cpu", revision: str | None = None
    ) -> ActivationPrior:
        """Load a prior from a folder or a Hugging Face Hub id.

        Raises:
            UserError: not a prior, a damaged file, or weights that do not fit the configuration.
        """
        config, tensors = folder.load(str(source), revision)
        statistics = Normalizer(
            tensors.pop("normalizer.mean"), tensors.pop("normalizer.var"), config.variance_floor
        )
        with torch.device("meta"):
            denoiser = new_denoiser(config)
        weights = {name.removeprefix("denoiser."): t for name, t in tensors.items()}
        try:
            denoiser.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            raise UserError(
                f"{source}: weights do not fit config.json: {' '.join(str(e).split())[:300]}"
            ) from e
        return cls(config, denoiser, statistics).to(device)

    def save_pretrained(self, path: str) -> None:
        """Write ``config.json`` and ``model.safetensors`` (weights and normaliser) into a folder."""
        folder.save(
            path, self.config, {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        )

    def velocity(self, z: Tensor, u: Tensor | float, layer: int | None = None) -> Tensor:
        """The network itself: ``E[noise - z | z_u]`` for *normalised* rows (n, d), u one number or (n,)."""
        u_M = torch.as_tensor(u, dtype=torch.float32, device=self.device).reshape(-1)
        if len(u_M) not in (1, len(z)):
            raise UserError(f"u: one noise level or one a row is needed, got {len(u_M)} for {len(z)} rows")
        u_M, index = torch.unique(u_M, return_inverse=True)
        gates = self._gates(u_M, self.layer_row(layer))
        return self.denoiser.velocity(z, gates, index if len(u_M) > 1 else None)

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        layer: int | None = None,
        steps: int = 32,
        probes: int = 2,
        ids: Ids = None,
        seed: int = 0,
    ) -> LogProb:
        """Log-likelihood of raw activations by the instantaneous change of variables (Chen et al. 2018).

        ``log p(z_0) = log N(z_1; 0, I) + integral_0^1 div v(z_u, u) du`` along the flow from u = 0 to u = 1.

        Args:
            x: (n, d), finite.
            layer: see the class.
            steps: midpoint intervals from 0 to 1, two network evaluations each.
            probes: Rademacher probes of the trace an evaluation; 0 for the exact trace (d up to 512).
            ids: see the class.
            seed: of the probes.

        One call at a time in a process: torch keeps the state of forward-mode differentiation globally.

        Raises:
            UserError: wrong width, empty or non-finite rows, a layer not modelled, no steps, negative probes.
        """
        row = self.layer_row(layer)
        if probes < 0 or (probes == 0 and self.d > EXACT_TRACE_MAX_D):
            raise UserError(
                f"probes: at least 1 is needed, or 0 (exact) up to width {EXACT_TRACE_MAX_D} (got {probes})"
            )
        grid = cosine_grid(0.0, 1.0, steps)
        parts = []
        for x_ND, ids_N2 in self._pieces(x, ids, self._trace_width(probes)):
            velocity = self._cached_velocity(row)
            trace = self._trace(velocity, ids_N2, seed, probes)
            z_1, divergence, variance = integrate_with_trace(
                velocity, trace, self.normalizer.normalize(x_ND, row), grid
            )
            base = -0.5 * (z_1.double().square().sum(1) + self.d * math.log(2 * math.pi))
            parts.append(torch.stack([base, divergence, variance.sqrt()]))
        base, divergence, stderr = torch.cat(parts, dim=1)
        log_det = self.normalizer.log_determinant(row)
        nats = base + divergence + log_det
        return LogProb(
            nats=nats.float(),
            nats_per_dim=(nats / self.d).float(),
            stderr=None if probes == 1 else stderr.float(),
            percentile=None,
            latent_percentile=None,
            base=base.float(),
            divergence=divergence.float(),
            log_determinant=log_det,
            evaluations=2 * steps,
        )

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        u: float = 0.5,
        steps: int = 10,
        mode: Literal["sample", "mean"] = "sample",
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
    ) -> Tensor:
        """Move raw activations (n, d) towards where natural ones lie: noise them to level u, then restore.

        Args:
            x: (n, d), finite.
            u: how far: 0 changes nothing, 1 forgets the row.
            steps: midpoint intervals from u to 0 (``sample`` only), two network evaluations each.
            mode: ``sample`` follows the flow to a natural state; ``mean`` takes E[z | z_u] in one evaluation.
            layer: see the class.
            ids: see the class.
            seed: of the noise.

        Raises:
            UserError: as :meth:`log_prob`, u outside [0, 1], another mode.
        """
        row = self.layer_row(layer)
        check_level(u)
        grid = cosine_grid(u, 0.0, steps)
        if mode not in ("sample", "mean"):
            raise UserError(f"mode: 'sample' or 'mean' is needed (got {mode!r})")
        found = []
        for x_ND, ids_N2 in self._pieces(x, ids, 1):
            noise = normal(seed, ids_N2, self.d, STREAM_PATH)
            z_u = interpolate(self.normalizer.normalize(x_ND, row), noise, u)
            velocity = self._cached_velocity(row)
            z = (
                integrate(velocity, z_u, grid)
                if mode == "sample"
                else posterior_mean(z_u, velocity(z_u, u), u)
            )
            found.append(self.normalizer.denormalize(z, row))
        return torch.cat(found)

    @torch.no_grad()
    def sample(
        self, n: int, steps: int = 20, layer: int | None = None, ids: Ids = None, seed: int = 0
    ) -> Tensor:
        """Draw n raw activations (n, d) by following the flow from noise; ``steps`` midpoint intervals from 1 to 0.

        Raises:
            UserError: n or steps below 1, a layer not modelled.
        """
        row = self.layer_row(layer)
        if n < 1:
            raise UserError(f"n: at least 1 is needed (got {n})")
        grid = cosine_grid(1.0, 0.0, steps)
        velocity = self._cached_velocity(row)
        found = []
        for ids_N2 in row_ids(ids, n, self.device).split(self._chunk_rows(1)):
            z = integrate(velocity, normal(seed, ids_N2, self.d, STREAM_SAMPLE), grid)
            found.append(self.normalizer.denormalize(z, row))
        return torch.cat(found)

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        u: float = 0.1,
        block: int | None = None,
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
    ) -> Tensor:
        """The prior's hidden units on raw activations noised to level u: its meta-neurons (n, features).

        Args:
            x: (n, d), finite.
            u: noise level; the published probes use 0.1.
            block: which denoiser block (features = d_mlp); None concatenates all (features = n_blocks * d_mlp).
            layer: see the class.
            ids: see the class.
            seed: of the noise.

        Raises:
            UserError: as :meth:`denoise`, or a block that the denoiser lacks.
        """
        row = self.layer_row(layer)
        check_level(u)
        if block is not None and not 0 <= block < self.config.n_blocks:
            raise UserError(f"block: this prior has blocks 0 to {self.config.n_blocks - 1} (got {block})")
        gates = self._gates(torch.full((1,), u, device=self.device), row)
        found = []
        for x_ND, ids_N2 in self._pieces(x, ids, self.config.n_blocks):
            noise = normal(seed, ids_N2, self.d, STREAM_ENCODE)
            z_u = interpolate(self.normalizer.normalize(x_ND, row), noise, u)
            hidden = self.denoiser.meta_neurons(z_u, gates)
            found.append(torch.cat(hidden, dim=1) if block is None else hidden[block])
        return torch.cat(found)

    def layer_row(self, layer: int | None) -> int:
        """The index of ``layer`` among the modelled ones. Raises UserError for another, or None with several."""
        if layer is None and len(self.layers) == 1:
            return 0
        if layer is None or layer not in self.layers:
            raise UserError(f"layer: this prior models {', '.join(map(str, self.layers))} (got {layer})")
        return self.layers.index(layer)

    def _gates(self, u_M: Tensor, row: int) -> list[Tensor]:
        depth = self.layers[row] / max(self.config.subject_layers - 1, 1)
        return self.denoiser.gates(u_M, torch.full_like(u_M, depth) if self.config.multi_layer else None)

    def _cached_velocity(self, row: int) -> Callable[[Tensor, float], Tensor]:
        """The velocity at one layer as a function of (rows, u), its time path computed once per u."""
        known: dict[float, list[Tensor]] = {}

        def velocity(z: Tensor, u: float) -> Tensor:
            if u not in known:
                known[u] = self._gates(torch.full((1,), u, device=self.device), row)
            return self.denoiser.velocity(z, known[u])

        return velocity

    def _trace(
        self, velocity: Callable[[Tensor, float], Tensor], ids_N2: Tensor, seed: int, probes: int
    ) -> Callable[[Tensor, float, int], tuple[Tensor, Tensor]]:
        def trace(z: Tensor, u: float, step: int) -> tuple[Tensor, Tensor]:
            velocity(z[:1], u)  # the time path is computed outside of the transforms
            chunk = max(1, CHUNK_FLOATS // (len(z) * self.config.d_mlp))
            if probes == 0:
                total = exact_trace(lambda s: velocity(s, u), z, chunk)
                return total, torch.zeros_like(total)
            return hutchinson_trace(lambda s: velocity(s, u), z, ids_N2, seed, step, probes, chunk)

        return trace

    def _trace_width(self, probes: int) -> int:
        return min(probes or self.d, 8)

    def _chunk_rows(self, width: int) -> int:
        return max(1, CHUNK_FLOATS // (width * max(self.config.d_mlp, self.d)))

    def _pieces(self, x: Tensor, ids: Ids, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Checked rows and their ids, in pieces that fit in memory, on the prior's device."""
        x = torch.as_tensor(x)
        if x.ndim != 2 or x.shape[1] != self.d:
            raise UserError(f"activations: expected shape (n, {self.d}), got {tuple(x.shape)}")
        if len(x) == 0:
            raise UserError("activations: at least one row is needed")
        try:
            ids_N2 = row_ids(ids, len(x), self.device)
        except ValueError as e:
            raise UserError(str(e)) from e
        rows = self._chunk_rows(width)
        for start in range(0, len(x), rows):
            piece = x[start : start + rows].to(self.device, torch.float32)
            finite = piece.isfinite().all(1)
            if not finite.all():
                bad = start + int((~finite).nonzero()[0])
                raise UserError(f"activations: row {bad} holds a value that is not finite; remove or mend it")
            yield piece, ids_N2[start : start + rows]


def new_denoiser(config: PriorConfig) -> Denoiser:
    """An initialised denoiser of the shape that ``config`` says."""
    return Denoiser(config.d, config.d_model, config.d_mlp, config.n_blocks, config.multi_layer)
