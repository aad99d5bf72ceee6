"""The configurations of ``dmm score``, ``denoise``, ``encode`` and ``sample``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dmm_ray.config import RESUMABLE, Config
from dmm_ray.operations import (
    DenoiseArguments,
    EncodeArguments,
    LogProbArguments,
    OperationArguments,
    SampleArguments,
    VelocityErrorArguments,
)
from dmm_ray.precision import PrecisionOption
from dmm_ray.store.manifest import DtypeName
from dmm_ray.subject.config import ModelSource
from dmm_ray.units.resources import ActorPool


class JobConfig(Config):
    """Options common to all four commands."""

    prior: str = Field(json_schema_extra=RESUMABLE)
    """The prior, ours or a published one: a folder, fsspec URI or hub id."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Folder to write or resume; a local path or fsspec URI."""
    layer: int | None = Field(default=None, json_schema_extra=RESUMABLE)
    """The layer; required if the prior models several."""
    precision: PrecisionOption = "auto"
    """Precision of the network's matrix products; states and sums are float32. auto is bfloat16 if the actors' devices
    are fast in it, else float32; a resumed job keeps its precision."""
    seed: int = 0
    """Seed of the noise, the probes and the draw of rows."""
    rows_per_shard: int | None = Field(default=None, ge=1, json_schema_extra=RESUMABLE)
    """Approximate rows per unit of work; defaults to 16384, fewer if rows are wide or few."""
    batch_rows: int | None = Field(default=None, ge=1, json_schema_extra=RESUMABLE)
    """Maximum rows given to the prior at once; defaults to all of a unit's, which it processes as memory allows."""
    pool: ActorPool = Field(default=ActorPool(), json_schema_extra=RESUMABLE)
    """The processes that each hold the prior."""

    def told(self, kind: type[OperationArguments], layer: int) -> dict[str, Any]:
        """The arguments of an operation of ``kind`` on rows of ``layer``."""
        given = {name: getattr(self, name) for name in kind.model_fields}
        return {**given, "layer": layer, "seed": self.seed, "precision": self.precision}


class StoreJobConfig(JobConfig):
    """Options of the commands that read activations."""

    activations: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Activation store to read. With --text, where to extract it first, which defaults to OUT-activations."""
    text: str | list[str] | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Text to extract the activations from, as for `dmm extract`."""
    subject: ModelSource = Field(default=ModelSource(), json_schema_extra=RESUMABLE)
    """The language model for extracting --text."""
    window: int | None = Field(default=None, ge=2, json_schema_extra=RESUMABLE)
    """Maximum tokens to read per document of --text; defaults to that of the store the prior was trained on, else that
    of `dmm extract`."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Use only documents in this part of the prior's own split."""
    rows: int | None = Field(default=None, ge=1)
    """Use only this many rows, drawn by seed; defaults to all."""

    @model_validator(mode="after")
    def _store_or_text(self) -> StoreJobConfig:
        if self.activations is None and self.text is None:
            raise ValueError("activations: give --activations STORE, or --text to extract them first")
        if self.text is None and (self.subject.model or self.subject.revision or self.window):
            raise ValueError("text: --model, --revision and --window have no effect without --text")
        return self


class ScoreConfig(StoreJobConfig, LogProbArguments, VelocityErrorArguments):
    """Score every row of an activation store or text: log-likelihood and percentiles."""

    window_tokens: int = Field(default=32, ge=0)
    """Length in tokens of the trailing windows whose means are added; 0 for none."""
    proxy: bool = False
    """Compute the cheap velocity error instead of the log-likelihood."""


class DenoiseConfig(StoreJobConfig, DenoiseArguments):
    """Move every row of an activation store or text towards natural activations; writes an activation store."""

    dtype: DtypeName | None = None
    """Stored number format; defaults to that of the store."""


class EncodeConfig(StoreJobConfig, EncodeArguments):
    """Write the prior's hidden units (meta-neurons) for every row of an activation store or text."""

    features: list[int] | None = Field(default=None, min_length=1)
    """Only these hidden units, by number; defaults to all."""
    dtype: Literal["float16", "float32"] = "float32"
    """Stored number format."""

    @model_validator(mode="after")
    def _one_choice_of_units(self) -> EncodeConfig:
        if self.features is not None and self.top is not None:
            raise ValueError("top: cannot be combined with --features; give one of the two")
        return self


class SampleConfig(JobConfig, SampleArguments):
    """Sample activations from the prior; writes an activation store."""

    n: int = Field(ge=1)
    """Number of rows."""
    dtype: DtypeName = "float32"
    """Stored number format."""
