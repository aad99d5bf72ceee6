"""Every operation of a prior, once: what it may be told, with bounds and defaults, and what it finds.

Configurations of the batch verbs, bodies of HTTP requests and parameters of the Open Inference Protocol inherit from
the arguments here; answers, tables and metadata are made of the results. Rows, their ids, the layer, the seed and the
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
"""Network evaluations in one interval of the grid."""
LEVEL_SEARCHES = 6
"""Restorations that it takes to find the level for a distance."""


class ResultColumn(NamedTuple):
    """Something that an operation finds for each row."""

    meaning: str
    nullable: bool = False
    """Whether it may be missing for all rows."""
    per_row: Literal["one", "d", "features", "top"] = "one"
    """How many numbers: one, the width of an activation, the hidden units, or those with the largest values."""
    integer: bool = False
    """int64; else float32."""


class OperationArguments(BaseModel):
    """What an operation may be told beside rows, ids, layer, seed and precision."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    NAME: ClassVar[OperationName]
    RESULTS: ClassVar[dict[str, ResultColumn]]

    def evaluations(self) -> int:
        """Network evaluations per row."""
        raise NotImplementedError

    def passes(self, d: int) -> int:
        """The work per row in forward passes: network evaluations and, as half of one each, tangents."""
        return self.evaluations()


class FlowArguments(OperationArguments):
    """Of operations that follow the flow."""

    steps: int = Field(default=20, ge=1)
    """Intervals of the solver's grid."""
    method: Method = "midpoint"
    """Runge-Kutta rule; it takes one (euler), two (midpoint, heun) or four (rk4) network evaluations an interval."""
    grid: Grid = "cosine"
    """Where the grid's points lie: cosine is dense at both ends, where the velocity bends most."""

    def evaluations(self) -> int:
        """Stages x steps."""
        return STAGES[self.method] * self.steps


class LogProbArguments(FlowArguments):
    """How likely is each row, in nats?"""

    NAME: ClassVar[OperationName] = "log_prob"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "nats": ResultColumn("log p(x) of the raw activation, nats"),
        "nats_per_dim": ResultColumn("nats / d"),
        "stderr": ResultColumn(
            "standard error of nats by the trace estimate; 0 with an exact trace, null from one probe", True
        ),
        "percentile": ResultColumn(
            "per cent of natural rows that are less likely; null without a calibration", True
        ),
        "latent_percentile": ResultColumn(
            "two-sided percentile of the latent norm, 0 to 100; null without a calibration", True
        ),
        "combined_percentile": ResultColumn(
            "percentile of the least of the two and of the row's own norm, the one to use; null without a calibration",
            True,
        ),
        "base": ResultColumn("log N(z_1; 0, I), nats"),
        "divergence": ResultColumn("integral of the velocity's divergence along the path, nats"),
    }

    steps: int = Field(default=32, ge=1)
    """Intervals of the solver's grid from data to noise."""
    probes: int = Field(default=2, ge=0)
    """Rademacher probes of the trace in each evaluation; 0 is the exact trace, d tangents, up to width 512."""

    def passes(self, d: int) -> int:
        """Evaluations, and a tangent for each probe (for each dimension with an exact trace)."""
        return self.evaluations() * (2 + (self.probes or d)) // 2


class VelocityErrorArguments(OperationArguments):
    """How natural is each row, by a cheap proxy: the velocity's error at fixed noise levels, without derivatives?"""

    NAME: ClassVar[OperationName] = "velocity_error"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "velocity_error": ResultColumn("mean squared velocity error, the training loss; small is natural"),
        "proxy_percentile": ResultColumn(
            "per cent of natural rows with a larger one; null without a calibration", True
        ),
    }

    pairs: int = Field(default=8, ge=1)
    """Pairs of noise level and noise; an evaluation each."""

    def evaluations(self) -> int:
        """One a pair."""
        return self.pairs


class DenoiseArguments(FlowArguments):
    """What is a natural activation near each row? Noise is added to level u and taken away again."""

    NAME: ClassVar[OperationName] = "denoise"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {"activations": ResultColumn("restored rows", per_row="d")}

    u: Level = 0.5
    """Noise level to restore from: 0 gives the row back, 1 forgets it."""
    distance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Instead of u: each row's largest level that moves it by this much at most, relative to its distance from the
    mean in normalised space."""
    steps: int = Field(default=10, ge=1)
    """Intervals of the solver's grid from u to 0."""
    mode: Mode = "sample"
    """sample follows the flow; mean takes the posterior mean in one evaluation."""

    def evaluations(self) -> int:
        """Those of a restoration; of several where a level is looked for."""
        once = 1 if self.mode == "mean" else super().evaluations()
        return once * (1 if self.distance is None else LEVEL_SEARCHES + 1)


class SampleArguments(FlowArguments):
    """Draw activations."""

    NAME: ClassVar[OperationName] = "sample"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {"activations": ResultColumn("drawn rows", per_row="d")}

    steps: int = Field(default=20, ge=1)
    """Intervals of the solver's grid from noise to data."""


class EncodeArguments(OperationArguments):
    """The denoiser's own hidden units (meta-neurons) for each row at a low noise level."""

    NAME: ClassVar[OperationName] = "encode"
    RESULTS: ClassVar[dict[str, ResultColumn]] = {
        "features": ResultColumn("hidden units; not with top", True, "features"),
        "indices": ResultColumn(
            "with top: numbers of the units with the largest values", True, "top", integer=True
        ),
        "values": ResultColumn("with top: their values, the largest first", True, "top"),
    }

    u: Level = 0.1
    """Noise level of the rows; the published probes use 0.1."""
    block: int | None = Field(default=None, ge=0)
    """Which block of the denoiser; by default all of them, one after the other."""
    noises: int = Field(default=1, ge=1)
    """How many noises the units are averaged over."""
    top: int | None = Field(default=None, ge=1)
    """Only the units with the largest values, this many, by number and value; of equal ones the first."""

    def evaluations(self) -> int:
        """One a noise."""
        return self.noises


OPERATIONS: dict[OperationName, type[OperationArguments]] = {
    kind.NAME: kind
    for kind in (LogProbArguments, VelocityErrorArguments, DenoiseArguments, SampleArguments, EncodeArguments)
}
