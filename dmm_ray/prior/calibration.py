"""A prior's calibration: the share of natural rows less likely than a given row, saved next to the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import exists, join, make_folder, read_bytes, write_bytes
from dmm_ray.prior.folder import CALIBRATION
from dmm_ray.prior.quantiles import QUANTILE_LEVELS, Table
from dmm_ray.prior.weights import read_header

KEY, VERSION = "calibration", 1
ROW_SCORES = ("nats", "latent", "norm", "velocity_error", "combined")
WINDOW_SCORES = ("nats_per_dim", "combined")


class Percentiles(NamedTuple):
    """Percentiles among natural rows of the same layer and position: (n,) float32 from 0 to 100 each."""

    percentile: Tensor
    """One-sided: the share of natural rows that are less likely. Small is unusual."""
    latent_percentile: Tensor
    """Two-sided, of the latent norm at u = 1: small is unusual, either too short or too long."""
    combined_percentile: Tensor
    """The smallest of these two and the two-sided percentile of the row's own norm, calibrated again: small is unusual
    in at least one of these ways."""


@dataclass(frozen=True)
class LayerCalibration:
    """The tables of one layer."""

    rows: Mapping[str, Table]
    """Keyed by ``ROW_SCORES``: ``nats``; ``latent``, the squared norm of z_1; ``norm``, that of the normalised row;
    ``velocity_error``; ``combined``, the log of the smallest share of the first three."""
    windows: Mapping[int, Mapping[str, Table]]
    """Tables of window means, keyed by width in tokens and then by ``WINDOW_SCORES``."""
    about: Mapping[str, Any]
    """How it was made: steps, probes, seed, rows, documents."""

    def shares(
        self, nats: Tensor, latent: Tensor, norm: Tensor, position: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shares (n,) float64: less likely rows; ``latent``, two-sided; log of the smallest of these and ``norm``'s."""
        less_likely, _ = self.rows["nats"].shares(nats, position)
        two_sided = self.two_sided("latent", latent, position)
        least = torch.minimum(torch.minimum(less_likely, two_sided), self.two_sided("norm", norm, position))
        return less_likely, two_sided, least.clamp(min=torch.finfo(torch.float64).tiny).log()

    def two_sided(self, name: str, score: Tensor, position: Tensor | None) -> Tensor:
        """Two-sided share (n,) float64: twice the smaller of the shares of natural rows below and above."""
        return 2 * torch.minimum(*self.rows[name].shares(score, position))


class Calibration:
    """Quantiles of a prior's scores on natural rows, by layer; ``a | b`` merges those of different layers.

    Args:
        d: the prior's width.
        by_layer: tables by block number.
        weights: the prior's :meth:`fingerprint`; None for a calibration from before fingerprints existed.
    """

    def __init__(self, d: int, by_layer: Mapping[int, LayerCalibration], weights: str | None = None) -> None:
        self.d = d
        self.by_layer = dict(by_layer)
        self.weights = weights

    def check(self, d: int, weights: str) -> None:
        """Raises UserError unless it was made for a prior of width ``d`` with fingerprint ``weights``."""
        if self.d != d or self.weights not in (None, weights):
            why = f"d = {self.d}, not {d}" if self.d != d else "other weights"
            raise UserError(
                f"{CALIBRATION}: made for a prior with {why}: its percentiles would be wrong; delete it, or calibrate "
                "this prior"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers that have tables."""
        return tuple(sorted(self.by_layer))

    @property
    def widths(self) -> tuple[int, ...]:
        """Window widths, in tokens, for which every layer has tables."""
        found = [set(layer.windows) for layer in self.by_layer.values()]
        return tuple(sorted(set.intersection(*found))) if found else ()

    def __or__(self, other: Calibration) -> Calibration:
        weights = self.weights if other.weights in (None, self.weights) else other.weights
        return Calibration(self.d, self.by_layer | other.by_layer, weights)

    def percentiles(
        self,
        layer: int,
        nats: Tensor,
        base: Tensor,
        norm: Tensor,
        position: Tensor | None = None,
    ) -> Percentiles:
        """Percentiles of rows, from the results of integrating their flow.

        Args:
            layer: the block number whose outputs they are.
            nats: (n,) log p(x), including the normaliser's log-determinant.
            base: (n,) log N(z_1; 0, I).
            norm: (n,) squared norm of the normalised rows.
            position: (n,) tokens from the document's start, to compare with natural rows near it; None compares with
                all positions.

        Raises:
            UserError: the layer has no tables.
        """
        tables = self._layer(layer)
        less_likely, two_sided, least = tables.shares(nats, latent_norm(base, self.d), norm, position)
        combined, _ = tables.rows["combined"].shares(least, position)
        return Percentiles(*(_per_cent(share) for share in (less_likely, two_sided, combined)))

    def proxy_percentile(self, layer: int, velocity_error: Tensor, position: Tensor | None = None) -> Tensor:
        """The share of natural rows with a larger velocity error, (n,) float32 from 0 to 100; small is unusual.

        Raises:
            UserError: the layer has no tables.
        """
        _, larger = self._layer(layer).rows["velocity_error"].shares(velocity_error, position)
        return _per_cent(larger)

    def window_percentile(self, layer: int, score: str, means: np.ndarray, width: int) -> np.ndarray:
        """The share of natural windows with a smaller mean, (n,) float32 from 0 to 100; NaN where the mean is NaN.

        Args:
            layer: the block number whose outputs the rows are.
            score: ``nats_per_dim``, or ``combined`` for means of ``combined_percentile``.
            means: (n,) as returned by :func:`~dmm_ray.prior.windows.window_means`.
            width: window width in tokens.

        Raises:
            UserError: there is no table for the layer, score or width.
        """
        tables = self._layer(layer).windows
        if width not in tables or score not in WINDOW_SCORES:
            known = f"{', '.join(map(str, self.widths)) or 'none'}, of {' and '.join(WINDOW_SCORES)}"
            raise UserError(f"width: windows calibrated are {known} (got {score} over {width} tokens)")
        below, _ = tables[width][score].shares(torch.as_tensor(means))
        return _per_cent(below).numpy()

    def save(self, folder: str) -> None:
        """Write ``calibration.safetensors`` into a prior's folder atomically."""
        tensors: dict[str, Tensor] = {}
        for number, layer in self.by_layer.items():
            tensors[f"{number}/edges"] = layer.rows["nats"].edges  # the same for all scores of a layer
            tensors |= {f"{number}/{score}": layer.rows[score].values for score in ROW_SCORES}
            for width, tables in layer.windows.items():
                tensors |= {f"{number}/window_{width}/{s}": tables[s].values for s in WINDOW_SCORES}
        about = {
            str(number): {**layer.about, "widths": list(layer.windows)}
            for number, layer in self.by_layer.items()
        }
        known = {"version": VERSION, "d": self.d, "weights": self.weights, "layers": about}
        metadata = json.dumps(known, sort_keys=True)
        make_folder(folder)
        write_bytes(join(folder, CALIBRATION), safetensors.torch.save(tensors, {KEY: metadata}))

    @classmethod
    def load(cls, folder: str) -> Calibration | None:
        """Load it from a prior's folder; None if absent. Raises UserError if it is damaged or of another version."""
        path = join(folder, CALIBRATION)
        if not exists(path):
            return None
        data = read_bytes(path)
        try:
            tensors = safetensors.torch.load(data)
            header, _ = read_header(lambda start, stop: data[start:stop])
            metadata = json.loads(header["__metadata__"][KEY])
            if metadata["version"] != VERSION:
                raise UserError(
                    f"{path}: version {metadata['version']}, expected {VERSION}; calibrate the prior again"
                )
            return cls(
                metadata["d"],
                {int(number): _layer(number, about, tensors) for number, about in metadata["layers"].items()},
                metadata.get("weights"),
            )
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{path}: damaged ({e}); delete it, or calibrate the prior again") from e

    def _layer(self, layer: int) -> LayerCalibration:
        if layer not in self.by_layer:
            raise UserError(f"layer: calibrated for {', '.join(map(str, self.layers))} (got {layer})")
        return self.by_layer[layer]


def _per_cent(share: Tensor) -> Tensor:
    """Shares (n,) as percentages, float32 and never 0: below the smallest float32, rows count as equally far out."""
    return (100 * share).float().clamp(min=torch.finfo(torch.float32).tiny)


def latent_norm(base: Tensor, d: int) -> Tensor:
    """The squared norm of z_1 (n,) from ``base = -(|z_1|^2 + d log 2 pi) / 2``."""
    return -2 * base.double() - d * math.log(2 * math.pi)


def _layer(number: str, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> LayerCalibration:
    edges, none = tensors[f"{number}/edges"], torch.empty(0, dtype=torch.int64)
    widths = about.pop("widths")
    return LayerCalibration(
        {score: _table(edges, tensors[f"{number}/{score}"]) for score in ROW_SCORES},
        {w: {s: _table(none, tensors[f"{number}/window_{w}/{s}"]) for s in WINDOW_SCORES} for w in widths},
        about,
    )


def _table(edges: Tensor, values: Tensor) -> Table:
    if values.shape != (1 + len(edges), QUANTILE_LEVELS) or not (values.diff(dim=1) >= 0).all():
        raise ValueError("a table has the wrong shape or is not ascending")
    return Table(edges, values)
