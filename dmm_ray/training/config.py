"""The configuration of ``dmm train`` and the network sizes it offers."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from dmm_ray.config import RESUMABLE, Config, Group
from dmm_ray.precision import PrecisionOption
from dmm_ray.prior.base import BaseKind
from dmm_ray.prior.flow import NOISE_LEVELS
from dmm_ray.store.split import Split

DEFAULT_SAMPLES = 100_000_000
Preset = Literal["auto", "glp-d3", "glp-d6", "glp-d12", "glp-d24"]


class Shape(NamedTuple):
    """Size of a denoiser."""

    d_model: int
    d_mlp: int
    n_blocks: int


class CheckpointRetention(NamedTuple):
    """Which checkpoints to keep."""

    last: int
    """This many of the newest."""
    every: int | None = None
    """The first one at or after each multiple of this many samples, permanently."""
    best: bool = False
    """The one with the lowest validation loss."""


class NetworkConfig(Group):
    """Size of the denoiser."""

    preset: Preset = "auto"
    """Network size: auto (from the activation width) or the published glp-d3, -d6, -d12, -d24 (width 2d, MLP 4d)."""
    d_model: int | None = Field(default=None, gt=0, multiple_of=2)
    """Residual width of the denoiser; defaults to the preset's."""
    d_mlp: int | None = Field(default=None, gt=0)
    """Hidden width of a block; defaults to the preset's."""
    n_blocks: int | None = Field(default=None, gt=0)
    """Number of blocks; defaults to the preset's."""

    def shape(self, d: int) -> Shape:
        """The denoiser's size for activations of width d."""
        base = preset_shape(self.preset, d)
        return Shape(self.d_model or base.d_model, self.d_mlp or base.d_mlp, self.n_blocks or base.n_blocks)


BASE_LEVELS = 32
"""Noise levels in a batch of a prior with a base, whose tables per level cost more than the network at 256 (d = 64)."""


class BaseConfig(Group):
    """A closed-form velocity that the network only has to correct."""

    base: BaseKind = "none"
    """none; gaussian of full covariance; mixture of diagonal Gaussians in one basis; factor_analysers. Fitted on
    training rows before the first step."""
    base_rows: int = Field(default=400_000, ge=1)
    """Training rows that it is fitted on, in whole documents."""
    base_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128, 512, 2048), min_length=1)
    """Numbers of Gaussians tried, rising until one is worse on validation rows."""
    base_ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(8, 16, 32, 64), min_length=1)
    """Factors of each factor analyser that are tried, likewise."""


class ScheduleConfig(Group):
    """Number of samples, batch size and order."""

    samples: int | None = Field(default=None, ge=1)
    """Activations to train on, counting repeats; rounded up to full batches; defaults to 100,000,000."""
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Instead of samples: as many as this machine trains on in about this time, measured by a trial of a few seconds
    before the run. A resumed run keeps the number."""
    batch: int = Field(default=4096, ge=1)
    """Samples in a global batch, over all workers."""
    levels_per_batch: int = Field(default=256, ge=1, le=NOISE_LEVELS)
    """Distinct noise levels in a global batch (divides it); the time path and the tables of a base are computed once
    per level. Defaults to 32 for a prior with a base."""
    shuffle_rows: int = Field(default=1 << 20, ge=1)
    """Rows shuffled together: row groups are drawn in random order, and rows permuted in windows of this many."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch % self.levels:
            raise ValueError(
                f"levels_per_batch: must divide batch {self.batch}; give a --levels-per-batch that does"
            )
        return self

    @property
    def levels(self) -> int:
        """Distinct noise levels in a global batch."""
        return min(self.levels_per_batch, self.batch)

    @property
    def total_batches(self) -> int:
        """Global batches of the whole run."""
        return -(-(self.samples or DEFAULT_SAMPLES) // self.batch)

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_batches * self.batch

    def every(self, samples: int | None, share: int) -> int:
        """An interval in global batches, given one in samples; by default 1 / ``share`` of the run."""
        return max(1, -(-(samples or self.total_samples // share) // self.batch))


class OptimizerConfig(Group):
    """AdamW, its learning-rate schedule, and the average of the weights."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; defaults to 16 / d_model^1.5."""
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Fraction of the run with linear warm-up, from 1 % of the peak."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are clipped."""
    ema: float = Field(default=0.05, gt=0, lt=0.25)
    """Width of the power-function average of the weights, relative to the run so far (sigma_rel of EDM2)."""


class DistributionConfig(Group):
    """Workers, their devices and how they share the work."""

    workers: int = Field(default=1, ge=0)
    """Ray Train workers; 0 trains in this process."""
    min_workers: int | None = Field(default=None, ge=1)
    """Train with as few as this while the cluster has no room for `workers`; grows back when it does."""
    resize_interval_s: float = Field(default=60.0, gt=0)
    """With min_workers: seconds between checks whether the cluster has room for more; growing discards the work since
    the last checkpoint."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds all weights; fsdp: weights, average and optimiser are sharded over the workers, for
    priors that do not fit."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs per worker; defaults to the cluster's CPUs divided by the workers, or to 1 on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs if the cluster has one for every worker."""
    max_failures: int = Field(default=3, ge=0)
    """Worker crashes after which training resumes from the last checkpoint."""
    micro_batch: int | None = Field(default=None, ge=2)
    """Most rows a worker passes through the network at once; a larger share is split and its gradients summed."""

    @model_validator(mode="after")
    def _workers_fit_together(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers: must not be more than workers ({self.workers}); lower it or raise --workers"
            )
        if self.parallel == "fsdp" and self.workers == 0:
            raise ValueError("parallel: fsdp shards over Ray workers; give --workers of 1 or more")
        return self


class CheckpointConfig(Group):
    """Which checkpoints are written and kept."""

    checkpoint_every: int | None = Field(default=None, ge=1)
    """Samples between checkpoints; defaults to a tenth of the run."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Samples; the first checkpoint at or after each multiple of this is kept permanently."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss permanently."""

    @property
    def retention(self) -> CheckpointRetention:
        """Which checkpoints to keep."""
        return CheckpointRetention(self.keep_checkpoints, self.keep_every, self.keep_best)


class ValidationConfig(Group):
    """Validation loss and calibration on validation documents."""

    validate_every: int | None = Field(default=None, ge=1)
    """Samples between validation losses; defaults to a tenth of the run."""
    validation_rows: int = Field(default=4096, ge=1)
    """Rows of the validation part that the validation loss is computed on, the same ones every time."""
    calibration_rows: int = Field(default=4096, ge=0, json_schema_extra=RESUMABLE)
    """Validation rows that the scores' percentiles are calibrated on after training; 0 skips calibration."""


class TrackingConfig(Group):
    """Logging and tracking."""

    log_every: int | None = Field(default=None, ge=1)
    """Samples between lines of stats.jsonl; defaults to a hundredth of the run."""
    peak_tflops: float | None = Field(default=None, gt=0, json_schema_extra=RESUMABLE)
    """Peak TFLOP/s of one device in this precision, for `utilisation`; defaults to the GPU's if it is known."""
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", json_schema_extra=RESUMABLE
    )
    """Weights & Biases: auto is online with an API key in the environment, else offline; WANDB_MODE overrides."""
    wandb_project: str = Field(default="dmm-ray", json_schema_extra=RESUMABLE)
    """Project that the run is logged to; the run is named after the output folder."""


class TrainConfig(Config):
    """Train a prior on an activation store."""

    activations: str = Field(json_schema_extra=RESUMABLE)
    """Activation store to train on: a folder or URI written by `dmm extract`."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Prior folder to write. The same command on an unfinished folder resumes."""
    layer: int | None = None
    """Which of the store's layers; required if it has several."""
    precision: PrecisionOption = "auto"
    """Precision of the matrix products; weights, sums and the optimiser are float32. auto is bfloat16 where it is fast
    on the workers' devices, else float32; a resumed run keeps the choice."""
    compile: bool | None = None
    """Compile the network with torch.compile; defaults to true on GPUs. On a CPU this requires a C++ compiler and, the
    first time, about 20 s."""
    split: Split = Split()
    """How documents are split; only the train part is trained on."""
    seed: int = 0
    """Seed of the initial weights, the data order and every sample's noise."""
    network: NetworkConfig = NetworkConfig()
    """Size of the denoiser."""
    analytic: BaseConfig = BaseConfig()
    """A closed-form velocity that the network only has to correct."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Number of samples, batch size and order."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its learning-rate schedule, and the average of the weights."""
    distribution: DistributionConfig = Field(default=DistributionConfig(), json_schema_extra=RESUMABLE)
    """Workers, their devices and how they share the work; a resumed run may change them."""
    checkpoints: CheckpointConfig = Field(default=CheckpointConfig(), json_schema_extra=RESUMABLE)
    """Which checkpoints are written and kept; a resumed run may change this."""
    validation: ValidationConfig = ValidationConfig()
    """Validation loss and calibration."""
    logging: TrackingConfig = TrackingConfig()
    """Logging and tracking."""

    @model_validator(mode="after")
    def _fewer_levels_with_a_base(self) -> Self:
        given = "levels_per_batch" in self.schedule.model_fields_set
        if self.analytic.base != "none" and not given and self.schedule.batch % BASE_LEVELS == 0:
            fewer = self.schedule.model_copy(update={"levels_per_batch": BASE_LEVELS})
            object.__setattr__(self, "schedule", fewer)
        return self

    @model_validator(mode="after")
    def _a_sample_for_each_worker(self) -> Self:
        if self.schedule.batch < self.distribution.workers:
            raise ValueError(
                f"batch: {self.distribution.workers} workers need a sample each; raise --batch or lower --workers"
            )
        return self

    def peak_lr(self, d: int) -> float:
        """The peak learning rate for activations of width d: measured at d_model 256, the published one at 4096."""
        return self.optimizer.lr or 16 * self.network.shape(d).d_model ** -1.5


def preset_shape(preset: Preset, d: int) -> Shape:
    """The size that a preset name stands for.

    ``auto`` is the published width (2d, 4d) at depth 6, wider for small d, where twice the width leaves the denoiser
    starved (d = 64: 256, 512). At equal training time, depth 6 beat depths 2, 3 and 4 there (docs/benchmarks.md).
    """
    if preset == "auto":
        return Shape(max(2 * d, min(4 * d, 512)), max(4 * d, min(8 * d, 1024)), 6)
    return Shape(2 * d, 4 * d, int(preset.removeprefix("glp-d")))
