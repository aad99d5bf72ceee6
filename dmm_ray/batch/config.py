"""What ``dmm score``, ``denoise``, ``encode`` and ``sample`` are told."""

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
    """What all of them are told."""

    prior: str = Field(json_schema_extra=RESUMABLE)
    """Prior: a folder, an fsspec URI or a hub id; ours or a published one."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Folder to write or to resume; a local path or fsspec URI."""
    layer: int | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Which layer; needed for a prior of several."""
    precision: PrecisionOption = "auto"
    """Of the network's matrix products; states and sums are float32. auto is bfloat16 where the actors' devices are
    fast in it, else float32; a resumed job keeps what was chosen."""
    seed: int = 0
    """Of noise, probes and the draw of rows."""
    rows_per_shard: int | None = Field(default=None, ge=1, json_schema_extra=RESUMABLE)
    """Rows of a unit of work, about; by default 16384, less where they are wide or few."""
    batch_rows: int | None = Field(default=None, ge=1, json_schema_extra=RESUMABLE)
    """Most rows given to the prior at once; by default a unit's, which it works through as memory allows."""
    pool: ActorPool = Field(default=ActorPool(), json_schema_extra=RESUMABLE)
    """The processes that each hold the prior."""

    def told(self, kind: type[OperationArguments], layer: int) -> dict[str, Any]:
        """What an operation of ``kind`` is told about rows of ``layer``."""
        given = {name: getattr(self, name) for name in kind.model_fields}
        return {**given, "layer": layer, "seed": self.seed, "precision": self.precision}


class StoreJobConfig(JobConfig):
    """Of the verbs that read activations."""

    activations: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Activation store to read. With --text it is extracted there first; by default then into OUT-activations."""
    text: str | list[str] | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Text to extract the activations from, as `dmm extract` takes it."""
    subject: ModelSource = Field(default=ModelSource(), json_schema_extra=RESUMABLE)
    """The language model, to extract --text."""
    window: int | None = Field(default=None, ge=2, json_schema_extra=RESUMABLE)
    """Most tokens of a document of --text that are read; by default as in the store that the prior was trained on, or
    as `dmm extract`."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Only documents of this part of the prior's own split."""
    rows: int | None = Field(default=None, ge=1)
    """Score only this many rows, drawn by seed; defaults to all."""

    @model_validator(mode="after")
    def _store_or_text(self) -> StoreJobConfig:
        if self.activations is None and self.text is None:
            raise ValueError("activations: give --activations STORE, or --text to extract them first")
        if self.text is None and (self.subject.model or self.subject.revision or self.window):
            raise ValueError("text: --model, --revision and --window require --text")
        return self


class ScoreConfig(StoreJobConfig, LogProbArguments, VelocityErrorArguments):
    """Score every row of an activation store, or of text: log-likelihood and percentiles."""

    window_tokens: int = Field(default=32, ge=0)
    """Add means over each token and those before it, this many; 0 leaves them out."""
    proxy: bool = False
    """Give the cheap velocity error instead of the log-likelihood."""


class DenoiseConfig(StoreJobConfig, DenoiseArguments):
    """Move every row of an activation store, or of text, to where natural ones lie; writes an activation store."""

    dtype: DtypeName | None = None
    """Stored number format; default that of the store."""


class EncodeConfig(StoreJobConfig, EncodeArguments):
    """Write the prior's hidden units (meta-neurons) on every row of an activation store, or of text."""

    features: list[int] | None = Field(default=None, min_length=1)
    """Only these hidden units, by number; default all."""
    dtype: Literal["float16", "float32"] = "float32"
    """Stored number format."""

    @model_validator(mode="after")
    def _one_choice_of_units(self) -> EncodeConfig:
        if self.features is not None and self.top is not None:
            raise ValueError("top: the largest units, or --features some by number: give one of the two")
        return self


class SampleConfig(JobConfig, SampleArguments):
    """Draw activations from the prior; writes an activation store."""

    n: int = Field(ge=1)
    """How many rows."""
    dtype: DtypeName = "float32"
    """Stored number format."""
