"""The operations on a unit's rows: each maps rows to named results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, JobConfig, SampleConfig, ScoreConfig
from dmm_ray.errors import UserError
from dmm_ray.operations import (
    DenoiseArguments,
    EncodeArguments,
    LogProbArguments,
    OperationArguments,
    SampleArguments,
    VelocityErrorArguments,
)
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.prior.ask import ask
from dmm_ray.prior.windows import window_means
from dmm_ray.store.manifest import DTYPES
from dmm_ray.store.reader import Rows

ACTIVATION, FEATURES, INDICES, VALUES = "activation", "features", "indices", "values"
Found = dict[str, Tensor]
"""Results of n rows by column: (n,) or (n, width), on the CPU. A missing column is null for every row."""
SCORES, PROXY = (
    {name: result.meaning for name, result in kind.RESULTS.items()}
    for kind in (LogProbArguments, VelocityErrorArguments)
)
WINDOWS = {
    "window_nats_per_dim": "mean of nats_per_dim over the last {} tokens; null if not all are present",
    "window_percentile": "per cent of natural windows with a smaller mean; null without a calibration for it",
    "window_combined_percentile": "the same for means of combined_percentile",
}
PROXY_WINDOWS = {
    "window_velocity_error": "mean of velocity_error over the last {} tokens; null if not all are present"
}


class BatchOperation(Protocol):
    """A picklable operation; ``layer`` is the block number of the rows."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the output table, with their meanings; empty if the output is activations."""

    @property
    def width(self) -> int:
        """Number of values per row while it is processed."""

    @property
    def nothing(self) -> Found:
        """The results of zero rows."""

    def batch(self, prior: ActivationPrior, x: Tensor, ids: Tensor) -> Found:
        """The results of rows x (n, d) with ids (n, 2)."""

    def unit(self, prior: ActivationPrior, rows: Rows, found: Found) -> Found:
        """Add the results that require all rows of a unit."""


@dataclass(frozen=True)
class ScoreOperation:
    """Log-likelihoods, or velocity errors."""

    config: ScoreConfig
    layer: int

    @property
    def columns(self) -> dict[str, str]:
        """The scores and, with ``window_tokens``, their window means."""
        scores, windows = (PROXY, PROXY_WINDOWS) if self.config.proxy else (SCORES, WINDOWS)
        width = self.config.window_tokens
        return scores | ({k: v.format(width) for k, v in windows.items()} if width else {})

    @property
    def width(self) -> int:
        """One value per column."""
        return len(self.columns)

    @property
    def nothing(self) -> Found:
        """No columns."""
        return {}

    def batch(self, prior: ActivationPrior, x: Tensor, ids: Tensor) -> Found:
        """One value per row in each column, (n,)."""
        kind = VelocityErrorArguments if self.config.proxy else LogProbArguments
        return _asked(prior, kind, self.config, self.layer, x, ids)

    def unit(self, prior: ActivationPrior, rows: Rows, found: Found) -> Found:
        """Add means over the last tokens of the same document; NaN if not all of them are among the rows."""
        width = self.config.window_tokens
        if not width:
            return found
        if self.config.proxy:
            return found | {"window_velocity_error": _mean(found["velocity_error"], rows, width)}
        means = {"nats_per_dim": _mean(found["nats_per_dim"], rows, width)}
        windows = {"window_nats_per_dim": means["nats_per_dim"]}
        calibration = prior.calibration
        if calibration and self.layer in calibration.layers and width in calibration.widths:
            means["combined"] = _mean(found["combined_percentile"], rows, width)
            for score, column in (
                ("nats_per_dim", "window_percentile"),
                ("combined", "window_combined_percentile"),
            ):
                shares = calibration.window_percentile(self.layer, score, means[score].numpy(), width)
                windows[column] = torch.from_numpy(shares)
        return found | windows


def _mean(values: Tensor, rows: Rows, width: int) -> Tensor:
    return torch.from_numpy(window_means(values.numpy(), rows.doc, rows.position, width).astype(np.float32))


def _asked(
    prior: ActivationPrior,
    kind: type[OperationArguments],
    config: JobConfig,
    layer: int,
    subject: Tensor | int,
    ids: Tensor,
) -> Found:
    """The prior's results, on the CPU. Raises UserError if they contain NaN or Inf."""
    columns = ask(prior, kind.NAME, subject, ids, config.told(kind, layer))
    found = {name: column.cpu() for name, column in columns.items() if column is not None}
    _check_answers(next(iter(found.values())), ids)
    return found


def _check_answers(found: Tensor, ids: Tensor) -> None:
    """Raise UserError if the prior's result (n, ..) for a row contains NaN or Inf; ids (n, 2) name the row.

    The rows themselves are finite, because the store was checked: such rows are so far out that the prior overflows.
    """
    bad = ~found.reshape(len(found), -1).isfinite().all(1)
    if bad.any():
        doc, position = ids[int(bad.nonzero()[0])].tolist()
        raise UserError(
            f"activations: the result for document {doc}, position {position} contains NaN or Inf: the row is too far "
            "from what the prior models; extract with --exclude '[\"outliers\"]' or drop the document"
        )


class _EachByItself:
    """An operation whose result for a row does not depend on other rows."""

    def unit(self, prior: ActivationPrior, rows: Rows, found: Found) -> Found:
        """Return ``found`` unchanged."""
        return found


class _Activations(_EachByItself):
    """An operation whose results are activations."""

    width: int
    dtype: str

    @property
    def columns(self) -> dict[str, str]:
        """Empty: activations are written."""
        return {}

    @property
    def nothing(self) -> Found:
        """An empty ``activation``, (0, d)."""
        return {ACTIVATION: torch.empty(0, self.width, dtype=DTYPES[self.dtype])}

    def _stored(self, found: Found, ids: Tensor) -> Found:
        rows = found["activations"].to(DTYPES[self.dtype])
        _check_answers(rows, ids)
        return {ACTIVATION: rows}


@dataclass(frozen=True)
class DenoiseOperation(_Activations):
    """Denoised activations."""

    config: DenoiseConfig
    layer: int
    width: int
    dtype: str

    def batch(self, prior: ActivationPrior, x: Tensor, ids: Tensor) -> Found:
        """``activation`` (n, d) in the stored dtype."""
        return self._stored(_asked(prior, DenoiseArguments, self.config, self.layer, x, ids), ids)


@dataclass(frozen=True)
class EncodeOperation(_EachByItself):
    """Meta-neurons."""

    config: EncodeConfig
    layer: int
    width: int
    kept: int
    """Number of these values that are written."""

    @property
    def columns(self) -> dict[str, str]:
        """One column, or two with ``top``."""
        c = self.config
        place = "all blocks" if c.block is None else f"block {c.block}"
        if c.top is not None:
            which = f"the {c.top} hidden units of {place} with the largest values at u = {c.u:g}"
            return {INDICES: f"numbers of {which}", VALUES: f"values of {which}, the largest first"}
        chosen = f"numbers {c.features}" if c.features else "all"
        meaning = f"{self.kept} little-endian {c.dtype}: hidden units of {place}, {chosen}, at u = {c.u:g}"
        return {FEATURES: meaning}

    @property
    def nothing(self) -> Found:
        """The columns with zero rows."""
        dtype = getattr(torch, self.config.dtype)
        if self.config.top is not None:
            shape = (0, self.config.top)
            return {INDICES: torch.empty(shape, dtype=torch.int64), VALUES: torch.empty(shape, dtype=dtype)}
        return {FEATURES: torch.empty(0, self.kept, dtype=dtype)}

    def batch(self, prior: ActivationPrior, x: Tensor, ids: Tensor) -> Found:
        """The columns, each (n, kept), in the stored dtype. Raises UserError if that cannot represent them."""
        c = self.config
        found = _asked(prior, EncodeArguments, c, self.layer, x, ids)
        name = FEATURES if c.top is None else VALUES
        kept = found[name] if c.features is None else found[name][:, c.features]
        stored = kept.to(getattr(torch, c.dtype))
        if not stored.isfinite().all():
            raise UserError(f"dtype: {c.dtype} cannot represent every hidden unit; give --dtype float32")
        return found | {name: stored}


@dataclass(frozen=True)
class SampleOperation(_Activations):
    """Sampled activations."""

    config: SampleConfig
    layer: int
    width: int
    dtype: str

    def batch(self, prior: ActivationPrior, x: Tensor, ids: Tensor) -> Found:
        """``activation`` (n, d) in the stored dtype; only the number of rows of x matters."""
        return self._stored(_asked(prior, SampleArguments, self.config, self.layer, len(ids), ids), ids)


def hidden_units(config: EncodeConfig, prior: PriorConfig) -> tuple[int, int]:
    """The number of hidden units per row, and how many of them are written.

    Raises:
        UserError: the prior lacks a requested block or hidden unit.
    """
    if config.block is not None and config.block >= prior.n_blocks:
        raise UserError(f"block: this prior has blocks 0 to {prior.n_blocks - 1} (got {config.block})")
    there = prior.d_mlp * (prior.n_blocks if config.block is None else 1)
    if config.top is not None:
        if config.top > there:
            raise UserError(
                f"top: expected 1 to {there}, this prior's number of hidden units (got {config.top})"
            )
        return there, config.top
    chosen = config.features or []
    if len(set(chosen)) < len(chosen) or not all(0 <= f < there for f in chosen):
        raise UserError(f"features: expected distinct numbers from 0 to {there - 1} (got {chosen})")
    return there, len(chosen) or there
