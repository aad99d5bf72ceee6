"""What ``dmm score``, ``denoise``, ``encode`` and ``sample`` are told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dmm_ray.config import RESUMABLE, Config
from dmm_ray.precision import PrecisionOption
from dmm_ray.prior.denoising import Mode
from dmm_ray.store.manifest import DtypeName


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
    actors: int | None = Field(default=None, ge=1, json_schema_extra=RESUMABLE)
    """Processes that each hold the prior; by default one per GPU, or one per 2 CPUs where there is none."""
    cpus_per_actor: float | None = Field(default=None, gt=0, json_schema_extra=RESUMABLE)
    """CPUs (and torch threads) of each; by default 2 at most without a GPU, 1 with one."""
    gpus_per_actor: float | None = Field(default=None, ge=0, json_schema_extra=RESUMABLE)
    """GPUs of each, a share such as 0.5 too; by default 1 where the cluster has any."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", json_schema_extra=RESUMABLE)
    """auto takes GPUs where the cluster has any."""

    @property
    def gpus(self) -> float | None:
        """GPUs asked for each actor; None for the default."""
        if self.device == "cpu":
            return 0.0
        return self.gpus_per_actor or (1.0 if self.device == "cuda" else self.gpus_per_actor)


class StoreJobConfig(JobConfig):
    """Of the verbs that read activations."""

    activations: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Activation store to read. With --text it is extracted there first; by default then into OUT-activations."""
    text: str | list[str] | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Text to extract the activations from, as `dmm extract` takes it."""
    model: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Subject model of --text; default the one that the prior was trained on."""
    revision: str | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = Field(default=False, json_schema_extra=RESUMABLE)
    """Run Python code that comes with the model, to extract --text."""
    window: int | None = Field(default=None, ge=2, json_schema_extra=RESUMABLE)
    """Tokens of a document of --text that are read, at most; default as `dmm extract`."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Only documents of this part of the prior's own split."""
    rows: int | None = Field(default=None, ge=1)
    """Take only so many rows, drawn by seed; default all."""

    @model_validator(mode="after")
    def _store_or_text(self) -> StoreJobConfig:
        if self.activations is None and self.text is None:
            raise ValueError("activations: give --activations STORE, or --text to extract them first")
        if self.text is None and (self.model or self.window or self.revision):
            raise ValueError("text: --model, --revision and --window are of no use without --text")
        return self


class ScoreConfig(StoreJobConfig):
    """Score every row of an activation store, or of text: log-likelihood and percentiles."""

    steps: int = Field(default=32, ge=1)
    """Solver intervals from data to noise, two network evaluations each."""
    probes: int = Field(default=2, ge=0)
    """Rademacher probes of the trace an evaluation; 0 is exact, up to width 512."""
    window_tokens: int = Field(default=32, ge=0)
    """Add means over each token and those before it, this many; 0 leaves them out."""
    proxy: bool = False
    """Give the cheap velocity error instead of the log-likelihood."""
    pairs: int = Field(default=8, ge=1)
    """Pairs of noise level and noise of the velocity error; an evaluation each."""


class DenoiseConfig(StoreJobConfig):
    """Move every row of an activation store, or of text, to where natural ones lie; writes an activation store."""

    u: float = Field(default=0.5, ge=0, le=1)
    """Noise level to restore from: 0 gives the row back, 1 forgets it."""
    distance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Instead of u: each row's largest level that moves it by this much at most, relative to its distance from the
    mean in normalised space."""
    steps: int = Field(default=10, ge=1)
    """Solver intervals from u to 0, two network evaluations each."""
    mode: Mode = "sample"
    """sample follows the flow; mean takes the posterior mean in one evaluation."""
    dtype: DtypeName | None = None
    """Stored number format; default that of the store."""


class EncodeConfig(StoreJobConfig):
    """Write the prior's hidden units (meta-neurons) on every row of an activation store, or of text."""

    u: float = Field(default=0.1, ge=0, le=1)
    """Noise level of the rows."""
    block: int | None = Field(default=None, ge=0)
    """Which denoiser block; default all, one after the other."""
    features: list[int] | None = Field(default=None, min_length=1)
    """Only these hidden units, by number; default all."""
    noises: int = Field(default=1, ge=1)
    """Noises that the units are averaged over."""
    dtype: Literal["float16", "float32"] = "float32"
    """Stored number format."""


class SampleConfig(JobConfig):
    """Draw activations from the prior; writes an activation store."""

    n: int = Field(ge=1)
    """How many rows."""
    steps: int = Field(default=20, ge=1)
    """Solver intervals from noise to data, two network evaluations each."""
    dtype: DtypeName = "float32"
    """Stored number format."""
