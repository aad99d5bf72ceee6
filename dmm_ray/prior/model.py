"""The user-facing prior: likelihood, denoising, sampling and encoding of raw activations; saved as a folder."""

from __future__ import annotations

import math
import tempfile
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from dmm_ray.arguments import as_integer, as_number
from dmm_ray.errors import UserError
from dmm_ray.files import join
from dmm_ray.gaussians import GaussianMixture
from dmm_ray.operations import Mode
from dmm_ray.precision import Precision, PrecisionOption, precision_on
from dmm_ray.prior import folder, publish
from dmm_ray.prior.base import base_from_tensors
from dmm_ray.prior.calibration import Calibration
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.denoising import Restorer, largest_levels, row_levels
from dmm_ray.prior.flow import interpolate
from dmm_ray.prior.likelihood import (
    EXACT_TRACE_MAX_D,
    LogProb,
    Path,
    PercentileContext,
    check_probes,
    integrate_log_prob,
    tangents_at_once,
)
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.noise import DRAW, STREAM_ENCODE, STREAM_PAIRS, STREAM_PATH, STREAM_SAMPLE, normal, row_ids
from dmm_ray.prior.normalizer import Normalizer
from dmm_ray.prior.rows import Ids, PriorRows, RowChunk, chunk_rows
from dmm_ray.prior.solver import Solver, check_level
from dmm_ray.prior.top import TopUnits
from dmm_ray.prior.velocities import Velocities, VelocityField
from dmm_ray.prior.weights import fingerprint
from dmm_ray.seeds import MASK64, as_seed


class ActivationPrior(nn.Module):
    """A diffusion meta-model of one language model's residual-stream activations.

    All methods take and return *raw* activations (n, d), float32. A row's result depends only on the row, its id, the
    arguments and ``seed``, up to float tolerance.

    Arguments shared by all methods: ``layer`` is the block number the rows come from (required for a multi-layer
    prior); ``ids`` identify rows for the noise, (n,) or (n, 2) integers (default 0..n-1); ``seed`` is any integer;
    ``solver`` is the integration method and grid (default: midpoint on the cosine grid); ``precision`` is that of the
    network's products: ``float32`` (like the weights, never TF32), ``bfloat16`` (states and sums stay in float32) or
    ``auto`` (bfloat16 where it is fast on the device); it defaults to the precision the prior was loaded with.

    Attributes:
        config: shape and provenance.
        denoiser: the network.
        normalizer: statistics of each layer.
        calibration: tables behind the percentiles, or None.
        base: the closed-form velocity that the network corrects, or None.
        velocities: the network as a velocity field, in several number formats.
        precision: the default precision of the operations.
    """

    def __init__(
        self,
        config: PriorConfig,
        denoiser: Denoiser,
        normalizer: Normalizer,
        base: GaussianMixture | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.denoiser = denoiser
        self.normalizer = normalizer
        self.base = base
        self.calibration: Calibration | None = None
        self.velocities = Velocities(config)
        self.precision: Precision = "float32"
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
    def untrained(
        cls,
        config: PriorConfig,
        mean: Tensor,
        var: Tensor,
        seed: int = 0,
        base: GaussianMixture | None = None,
    ) -> Self:
        """A prior with random weights, from per-layer statistics mean and var, (d,) or (L, d).

        With a base its last layer is zero: it begins as the base.

        Example:
            >>> ActivationPrior.untrained(prior.config, prior.normalizer.mean, prior.normalizer.var).d
            64
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(as_seed(seed) & MASK64)
            denoiser = new_denoiser(config)
        shape = (len(config.layers), config.d)
        normalizer = Normalizer(mean.reshape(shape), var.reshape(shape), config.variance_floor)
        return cls(config, denoiser, normalizer, base)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        device: str = "cpu",
        revision: str | None = None,
        precision: PrecisionOption = "float32",
    ) -> Self:
        """Load a prior, in our format or the published one, from a folder, an fsspec URI or a Hugging Face Hub id.

        Args:
            source: the folder, URI or Hub id.
            device: a torch device.
            revision: branch, tag or commit of a Hub id.
            precision: default precision of the network's products; ``auto`` is bfloat16 where it is fast on the device.

        Raises:
            UserError: not a prior, a damaged file, or weights that do not fit the configuration.

        Example:
            >>> prior = ActivationPrior.from_pretrained("runs/demo/prior")
            >>> prior.layers
            (2,)
        """
        path = folder.resolve(str(source), revision)
        config, tensors = folder.load(path)
        base = base_from_tensors(tensors, config.base, config.d, join(path, folder.WEIGHTS))
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
        prior = cls(config, denoiser, statistics, base).to(device)
        prior.precision = precision_on(precision, device)
        prior.calibration = Calibration.load(path)
        prior._check_calibration()
        return prior

    def save_pretrained(self, path: str) -> None:
        """Write ``config.json``, ``model.safetensors`` (weights and normaliser) and the calibration into a folder.

        Example:
            >>> prior.save_pretrained("runs/copy")
            >>> ActivationPrior.from_pretrained("runs/copy").fingerprint() == prior.fingerprint()
            True
        """
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        self._check_calibration()
        folder.save(path, self.config, tensors)
        if self.calibration is not None:
            self.calibration.save(path)

    def fingerprint(self) -> str:
        """Fingerprint of the weights and the normaliser: see :func:`dmm_ray.prior.weights.fingerprint`.

        Example:
            >>> len(prior.fingerprint())
            64
        """
        return fingerprint(self.state_dict())

    def _check_calibration(self) -> None:
        """Raises UserError if the calibration belongs to other weights."""
        if self.calibration is not None:
            self.calibration.check(self.d, self.fingerprint())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        commit_message: str = "Upload a prior",
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload this prior with a model card to the Hugging Face Hub; returns the commit's URL.

        Args: see :func:`dmm_ray.prior.publish.push_to_hub`.

        Example:
            >>> prior.push_to_hub("me/my-prior", private=True)  # doctest: +SKIP
        """
        with tempfile.TemporaryDirectory() as path:
            self.save_pretrained(path)
            return publish.push_to_hub(
                path,
                repo_id,
                private=private,
                license=license,
                commit_message=commit_message,
                token=token,
                revision=revision,
            )

    def compile(self, **options: Any) -> None:
        """Compile the network from now on, with ``options`` of torch.compile, such as ``mode="reduce-overhead"``.

        Example:
            >>> prior.compile(mode="max-autotune")  # doctest: +SKIP
        """
        self.velocities.compile(options)

    def velocity(self, z: Tensor, u: Tensor | float, layer: int | None = None) -> Tensor:
        """The network itself: ``E[noise - z | z_u]`` for *normalised* rows (n, d), u one number or (n,).

        Example:
            >>> prior.velocity(torch.randn(3, prior.d), 0.5).shape
            torch.Size([3, 64])
        """
        if z.ndim != 2 or z.shape[1] != self.d:
            raise UserError(f"z: expected shape (n, {self.d}), got {tuple(z.shape)}")
        levels = row_levels(u, len(z))
        return self._field(self.layer_index(layer)).at_levels(z, levels.to(z.device, torch.float32))

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        layer: int | None = None,
        steps: int = 32,
        probes: int = 2,
        ids: Ids = None,
        seed: int = 0,
        solver: Solver | None = None,
        precision: PrecisionOption | None = None,
        exact_limit: int = EXACT_TRACE_MAX_D,
    ) -> LogProb:
        """Log-likelihood of raw activations by the instantaneous change of variables (Chen et al. 2018).

        ``log p(z_0) = log N(z_1; 0, I) + integral_0^1 div v(z_u, u) du`` along the flow from u = 0 to u = 1.

        Args:
            x: (n, d), finite.
            layer: see the class.
            steps: intervals from 0 to 1, two network evaluations each (midpoint).
            probes: Rademacher probes per trace estimate; 0 for the exact trace.
            ids: see the class.
            seed: seed of the probes.
            solver: see the class.
            precision: see the class.
            exact_limit: largest width at which ``probes=0`` is allowed.

        Raises:
            UserError: wrong width, no rows, rows with NaN or Inf, a layer not modelled, fewer than one step, negative
                probes, or an exact trace beyond ``exact_limit``.

        Example:
            >>> found = prior.log_prob(x, steps=4, ids=ids)
            >>> found.nats.shape == found.percentile.shape == (len(x),)
            True
        """
        index, solver = self.layer_index(layer), solver or Solver()
        probes = check_probes(probes, self.d, exact_limit)
        points, field = solver.points(0.0, 1.0, steps), self._field(index, precision)
        rows = self._rows(x, ids, index)
        pieces = rows.pieces(1 + tangents_at_once(probes, self.d))
        path = Path.joined(
            [integrate_log_prob(field, piece, solver, points, seed, probes) for piece in pieces]
        )
        log_det = self.normalizer.log_determinant(index)
        scale = PercentileContext(self.calibration, rows.layer, rows.positions)
        return LogProb.of(path, log_det, self.d, probes, solver.stages * steps, scale)

    @torch.no_grad()
    def velocity_error(
        self,
        x: Tensor,
        layer: int | None = None,
        pairs: int = 8,
        ids: Ids = None,
        seed: int = 0,
        precision: PrecisionOption | None = None,
    ) -> Tensor:
        """A cheap proxy for ``-log_prob`` (n,): mean squared error of the velocity over fixed (u, noise) pairs.

        ``mean over k of |v(z_u, u_k) - (noise_k - z)|^2 / d`` with ``u_k = (k + 1/2) / pairs``: one evaluation each, no
        derivatives. Lower is more natural; the scale is that of the training loss.

        Raises:
            UserError: as for :meth:`log_prob`; fewer than one pair.

        Example:
            >>> prior.velocity_error(x).shape == (len(x),)
            True
        """
        index, pairs = self.layer_index(layer), as_integer("pairs", pairs, least=1)
        field, rows = self._field(index, precision), self._rows(x, ids, index)
        total = torch.zeros(len(rows), device=self.device)
        for piece in rows.pieces(1):
            for k in range(pairs):
                noise, u = normal(seed, piece.ids, self.d, STREAM_PAIRS + k * DRAW), (k + 0.5) / pairs
                error = field(interpolate(piece.z, noise, u), u) - (noise - piece.z)
                total[piece.at] += error.square().mean(1) / pairs
        return total

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        u: float | Tensor = 0.5,
        steps: int = 10,
        mode: Mode = "sample",
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
        solver: Solver | None = None,
        precision: PrecisionOption | None = None,
        distance: float | None = None,
    ) -> Tensor:
        """Move raw activations (n, d) towards natural ones: noise them to level u, then restore.

        Args:
            x: (n, d), finite.
            u: noise level (0 returns the row, 1 discards it), a number or one per row (n,); equal levels share a solve.
            steps: intervals from u to 0 (``sample`` only), two network evaluations each (midpoint).
            mode: ``sample`` follows the flow to a natural state; ``mean`` takes E[z | z_u] in one evaluation.
            layer: see the class.
            ids: see the class.
            seed: seed of the noise.
            solver: see the class.
            precision: see the class.
            distance: instead of ``u``: each row's :meth:`level_for_distance`.

        Raises:
            UserError: as for :meth:`log_prob` and :meth:`level_for_distance`; u outside [0, 1]; an unknown mode.

        Example:
            >>> prior.denoise(x, u=0.3, steps=4).shape == x.shape
            True
        """
        if distance is not None:
            u = self.level_for_distance(x, distance, steps, mode, layer, ids, seed, solver, precision)
        index = self.layer_index(layer)
        restorer = Restorer(self._field(index, precision), solver or Solver(), steps, mode)
        rows = self._rows(x, ids, index)
        levels, found = row_levels(u, len(rows)), rows.empty(self.d)
        for piece in rows.pieces(1):
            noise, u_M = normal(seed, piece.ids, self.d, STREAM_PATH), levels[piece.at]
            restored = self.normalizer.denormalize(restorer.at_levels(piece.z, noise, u_M), index)
            found[piece.at] = torch.where((u_M > 0).to(self.device)[:, None], restored, piece.x)
        return found

    @torch.no_grad()
    def level_for_distance(
        self,
        x: Tensor,
        distance: float,
        steps: int = 10,
        mode: Mode = "sample",
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
        solver: Solver | None = None,
        precision: PrecisionOption | None = None,
    ) -> Tensor:
        """The ``u`` (n,) at which :meth:`denoise`, with the same arguments, moves each row by at most ``distance``.

        The distance is relative and in normalised space: ``|restored - z| / |z|``, so 0.3 moves a row by three tenths
        of its own distance from the mean. Levels are multiples of 1/32, found by bisection at the cost of about 6
        calls.

        Raises:
            UserError: as for :meth:`denoise`; a distance that is negative or not finite.

        Example:
            >>> u = prior.level_for_distance(x, distance=4.0, steps=2)
            >>> prior.denoise(x, u=u, steps=2).shape == x.shape
            True
        """
        index = self.layer_index(layer)
        if not 0 <= as_number("distance", distance) < math.inf:
            raise UserError(f"distance: expected a finite number, 0 or more (got {distance})")
        restorer = Restorer(self._field(index, precision), solver or Solver(), steps, mode)
        rows, found = self._rows(x, ids, index), []
        for z, noise in ((p.z, normal(seed, p.ids, self.d, STREAM_PATH)) for p in rows.pieces(1)):

            def restore(u_M: Tensor, z: Tensor = z, noise: Tensor = noise) -> Tensor:
                return restorer.at_levels(z, noise, u_M)

            found.append(largest_levels(restore, z, distance))
        return torch.cat(found)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 20,
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
        solver: Solver | None = None,
        precision: PrecisionOption | None = None,
    ) -> Tensor:
        """Draw n raw activations (n, d) by following the flow from noise; ``steps`` intervals from 1 to 0.

        Raises:
            UserError: n or steps below 1, a layer not modelled.

        Example:
            >>> prior.sample(5, steps=4).shape
            torch.Size([5, 64])
        """
        index, solver = self.layer_index(layer), solver or Solver()
        n = as_integer("n", n, least=1)
        points, field = solver.points(1.0, 0.0, steps), self._field(index, precision)
        size, ids_N2 = chunk_rows(self.config, 1, self.device), row_ids(ids, n, self.device)
        found = torch.empty(n, self.d, device=self.device)
        for start in range(0, n, size):
            noise = normal(seed, ids_N2[start : start + size], self.d, STREAM_SAMPLE)
            z = solver.integrate(field, noise, points)
            found[start : start + size] = self.normalizer.denormalize(z, index)
        return found

    @overload
    def encode(
        self,
        x: Tensor,
        u: float = ...,
        block: int | None = ...,
        layer: int | None = ...,
        ids: Ids = ...,
        seed: int = ...,
        noises: int = ...,
        precision: PrecisionOption | None = ...,
        top: None = ...,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        x: Tensor,
        u: float = ...,
        block: int | None = ...,
        layer: int | None = ...,
        ids: Ids = ...,
        seed: int = ...,
        noises: int = ...,
        precision: PrecisionOption | None = ...,
        *,
        top: int,
    ) -> TopUnits: ...

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        u: float = 0.1,
        block: int | None = None,
        layer: int | None = None,
        ids: Ids = None,
        seed: int = 0,
        noises: int = 1,
        precision: PrecisionOption | None = None,
        top: int | None = None,
    ) -> Tensor | TopUnits:
        """The prior's hidden units on raw activations noised to level u: its meta-neurons (n, features).

        Args:
            x: (n, d), finite.
            u: noise level; the published probes use 0.1.
            block: which denoiser block (features = d_mlp); None concatenates all (features = n_blocks * d_mlp).
            layer: see the class.
            ids: see the class.
            seed: seed of the noise.
            noises: number of noise draws that the units are averaged over.
            precision: see the class.
            top: return only this many units with the largest values, as :class:`TopUnits`.

        Raises:
            UserError: as for :meth:`denoise`; a block that the denoiser lacks; no noises; more units than there are.

        Example:
            >>> prior.encode(x[:5]).shape
            torch.Size([5, 512])
            >>> prior.encode(x[:5], top=8).indices.shape
            torch.Size([5, 8])
        """
        index, blocks = self.layer_index(layer), self.config.n_blocks
        check_level(u)
        if block is not None and not 0 <= (block := as_integer("block", block)) < blocks:
            raise UserError(f"block: this prior has blocks 0 to {blocks - 1} (got {block})")
        noises, u = as_integer("noises", noises, least=1), as_number("u", u)
        field, rows = self._field(index, precision), self._rows(x, ids, index)
        units = self.config.d_mlp * (blocks if block is None else 1)
        if top is not None and not 1 <= (top := as_integer("top", top)) <= units:
            raise UserError(f"top: 1 to {units} of this prior's hidden units can be asked for (got {top})")

        def encoded(piece: RowChunk) -> Tensor:
            total = torch.zeros(len(piece.z), units, device=self.device)
            for k in range(noises):
                noise = normal(seed, piece.ids, self.d, STREAM_ENCODE + k * DRAW)
                hidden = field.hidden(interpolate(piece.z, noise, u), u)
                total += (torch.cat(hidden, dim=1) if block is None else hidden[block]) / noises
            return total

        if top is not None:  # only one piece's features are held at a time, never those of all rows
            parts = [TopUnits.of(encoded(piece), top) for piece in rows.pieces(blocks)]
            return TopUnits(*(torch.cat(column) for column in zip(*parts, strict=True)))
        found = rows.empty(units)
        for piece in rows.pieces(blocks):
            found[piece.at] = encoded(piece)
        return found

    def _field(self, layer_index: int, precision: PrecisionOption | None = None) -> VelocityField:
        chosen = self.precision if precision is None else precision_on(precision, self.device)
        return self.velocities.field(self.denoiser, layer_index, chosen, self.base)

    def _rows(self, x: Any, ids: Ids, layer_index: int) -> PriorRows:
        return PriorRows(x, ids, self.config, self.normalizer, layer_index)

    def layer_index(self, layer: int | None) -> int:
        """The index of ``layer`` among the modelled ones. Raises UserError for any other, or for None with several.

        Example:
            >>> prior.layer_index(2)
            0
        """
        if layer is None and len(self.layers) == 1:
            return 0
        if layer is None or as_integer("layer", layer) not in self.layers:
            raise UserError(f"layer: this prior models {', '.join(map(str, self.layers))} (got {layer})")
        return self.layers.index(layer)


def new_denoiser(config: PriorConfig) -> Denoiser:
    """A newly initialised denoiser of the shape given by ``config``; with a base, its output starts at zero."""
    denoiser = Denoiser(config.d, config.d_model, config.d_mlp, config.n_blocks, config.multi_layer)
    if config.base != "none":
        nn.init.zeros_(denoiser.out_proj.weight)
        nn.init.zeros_(denoiser.out_proj.bias)
    return denoiser
