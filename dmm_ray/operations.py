"""The single definition of every operation of a prior: its arguments, with bounds and defaults, and its results.

Configurations of the batch verbs, HTTP request bodies and parameters of the Open Inference Protocol inherit from the
arguments here; responses, tables and metadata are built from the results. Rows, their ids, the layer, the seed and the
precision are arguments of every operation.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["sample", "mean"]
Method = Literal["euler", "midpoint", "heun", "rk4"]
Grid = Literal["cosine", "uniform"]
OperationName = Literal["log_prob", "velocity_error", "denoise", "sample", "encode"]
Level = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
STAGES: dict[Method, int] = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Network evaluations per grid interval."""
LEVEL_SEARCHES = 6
"""Restorations needed to find the noise level for a distance."""


class ResultColumn(NamedTuple):
    """A result that an operation returns for each row."""

    meaning: str
    nullable: bool = False
    """Whether it may be missing for all rows."""
    per_row: Literal["one", "d", "features", "top"] = "one"
    """Numbers per row: one, the activation width, the number of hidden units, or ``top`` of them."""
    integer: bool = False
    """Whether it is int64 rather than float32."""


class OperationArguments(BaseModel):
    """The arguments of an operation other than rows, ids, layer, seed and precision."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    NAME: ClassVar[OperationName]
    RESULTS: ClassVar[dict[str, ResultColumn]]

    def evaluations(self) -> int:
        """Network evaluations per row."""
        raise NotImplementedError

    def passes(self, d: int) -> int:
        """The cost per row in forward passes: one per network evaluation and half of one per tangent."""
        return self.evaluations()


class FlowArguments(OperationArguments):
    """Arguments of operations that follow the flow."""

    steps: int = Field(default=20, ge=1)
    """Intervals of the solver's grid."""
    method: Method = "midpoint"
    """Runge-Kutta method: one (euler), two (midpoint, heun) or four (rk4) network evaluations per interval."""
    grid: Grid = "cosine"
    """Spacing of the grid points; cosine is dense at both ends, where the velocity bends most."""

    def evaluations(self) -> int:
        """Stages x steps."""
        return STAGES[self.method] * self.steps


class LogProbArguments(FlowArguments):
    """Log-probability of each row, in nats."""

    NAME: ClassVar[OperationName] = "log_prob"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "nats": ResultColumn("log p(x) of the raw activation, nats"),
        "nats_per_dim": ResultColumn("nats / d"),
        "stderr": ResultColumn(
            "standard error of nats from the trace estimate; 0 for an exact trace, null with one probe", True
        ),
        "percentile": ResultColumn(
            "percentage of natural rows that are less likely; null without a calibration", True
        ),
        "latent_percentile": ResultColumn(
            "two-sided percentile of the latent norm, 0 to 100; null without a calibration", True
        ),
        "combined_percentile": ResultColumn(
            "percentile of the lowest of those two and of that of the row's norm, the one to use; null without a "
            "calibration",
            True,
        ),
        "base": ResultColumn("log N(z_1; 0, I), nats"),
        "divergence": ResultColumn("integral of the velocity's divergence along the path, nats"),
    }

    steps: int = Field(default=32, ge=1)
    """Intervals of the solver's grid from data to noise."""
    probes: int = Field(default=2, ge=0)
    """Rademacher probes of the trace per evaluation; 0 computes the exact trace with d tangents, up to width 512."""

    def passes(self, d: int) -> int:
        """Evaluations, and a tangent per probe (per dimension for an exact trace) in half of them."""
        return self.evaluations() * (2 + (self.probes or d)) // 2


class VelocityErrorArguments(OperationArguments):
    """How natural each row is, by a cheap proxy: the velocity error at fixed noise levels, without derivatives."""

    NAME: ClassVar[OperationName] = "velocity_error"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "velocity_error": ResultColumn(
            "mean squared velocity error, the training loss; lower is more natural"
        ),
        "proxy_percentile": ResultColumn(
            "percentage of natural rows with a larger error; null without a calibration", True
        ),
    }

    pairs: int = Field(default=8, ge=1)
    """Pairs of noise level and noise, one network evaluation each."""

    def evaluations(self) -> int:
        """One per pair."""
        return self.pairs


class DenoiseArguments(FlowArguments):
    """Move each row to a nearby natural activation: add noise up to level u, then remove it."""

    NAME: ClassVar[OperationName] = "denoise"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {"activations": ResultColumn("restored rows", per_row="d")}

    u: Level = 0.5
    """Noise level to restore from: 0 returns the row unchanged, 1 forgets it."""
    distance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Instead of u: for each row, use the largest level that moves it by at most this much, relative to its distance
    from the mean in normalised space."""
    steps: int = Field(default=10, ge=1)
    """Intervals of the solver's grid from u to 0."""
    mode: Mode = "sample"
    """sample follows the flow; mean takes the posterior mean in one evaluation."""

    def evaluations(self) -> int:
        """Those of one restoration, or of several where the level is searched for."""
        once = 1 if self.mode == "mean" else super().evaluations()
        return once * (1 if self.distance is None else LEVEL_SEARCHES + 1)


class SampleArguments(FlowArguments):
    """Draw activations from the prior."""

    NAME: ClassVar[OperationName] = "sample"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {"activations": ResultColumn("drawn rows", per_row="d")}

    steps: int = Field(default=20, ge=1)
    """Intervals of the solver's grid from noise to data."""


class EncodeArguments(OperationArguments):
    """The denoiser's hidden units (meta-neurons) for each row at a low noise level."""

    NAME: ClassVar[OperationName] = "encode"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "features": ResultColumn("hidden units; absent with top", True, "features"),
        "indices": ResultColumn(
            "with top: indices of the units with the largest values", True, "top", integer=True
        ),
        "values": ResultColumn("with top: their values, largest first", True, "top"),
    }

    u: Level = 0.1
    """Noise level of the rows; the published probes use 0.1."""
    block: int | None = Field(default=None, ge=0)
    """Block of the denoiser; defaults to all blocks, concatenated."""
    noises: int = Field(default=1, ge=1)
    """Number of noise draws to average the units over."""
    top: int | None = Field(default=None, ge=1)
    """Return only this many units with the largest values, as indices and values; ties go to the lower index."""

    def evaluations(self) -> int:
        """One per noise draw."""
        return self.noises


OPERATIONS: dict[OperationName, type[OperationArguments]] = {
    kind.NAME: kind
    for kind in (LogProbArguments, VelocityErrorArguments, DenoiseArguments, SampleArguments, EncodeArguments)
}
