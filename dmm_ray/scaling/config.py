"""The configuration of ``dmm scaling``."""

from __future__ import annotations

from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from dmm_ray.config import RESUMABLE, Config
from dmm_ray.precision import PrecisionOption
from dmm_ray.prior.base import BaseKind
from dmm_ray.subject.config import ModelSource

SIZE = r"^[1-9][0-9]*x[1-9][0-9]*$"
LEAST_CELLS = 4
"""Three parameters are fitted to the cells on the frontier: fewer say nothing."""


class Cell(NamedTuple):
    """One training run of a grid."""

    d_model: int
    n_blocks: int
    samples: int

    @property
    def name(self) -> str:
        """Its folder's name, ``256x6-1000000``."""
        return f"{self.d_model}x{self.n_blocks}-{self.samples}"


class ScalingConfig(Config):
    """Train priors of several sizes on several numbers of samples, and fit a scaling law to their losses."""

    activations: str = Field(json_schema_extra=RESUMABLE)
    """Activation store to train and test on."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Folder for the priors, summary.json and scaling.png. The same command resumes: finished cells are kept."""
    layer: int | None = None
    """Which of the store's layers; required if it has several."""
    text: str | list[str] | None = Field(default=None, json_schema_extra=RESUMABLE)
    """Text of the store, if it has moved; defaults to the paths in the store's manifest."""
    subject: ModelSource = Field(default=ModelSource(), json_schema_extra=RESUMABLE)
    """The language model, if it has moved."""
    sizes: tuple[Annotated[str, Field(pattern=SIZE)], ...] = Field(
        default=("64x2", "128x3", "256x6"), min_length=1
    )
    """Network sizes, residual width x blocks; the hidden width is twice the residual width."""
    samples: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(100_000, 300_000, 1_000_000), min_length=1
    )
    """Numbers of training samples. Each is a run of its own, with its own learning-rate schedule."""
    batch: int = Field(default=1024, ge=1)
    """Samples per training batch."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of every size; defaults to 16 / d_model^1.5."""
    base: BaseKind = "none"
    """Closed-form velocity that the networks correct, as in `dmm train`."""
    precision: PrecisionOption = "auto"
    """Precision of the matrix products, as in `dmm train`."""
    max_rows: int = Field(default=20_000, ge=1)
    """Test rows for the flow-matching loss, in whole documents; every cell sees the same rows and noise."""
    lm_documents: int = Field(default=60, ge=0)
    """Test documents for the delta LM loss at u = 0.5; 0 skips it."""
    cpus_per_cell: float = Field(default=1, gt=0, json_schema_extra=RESUMABLE)
    """CPUs of a run; as many run at once as the cluster has room for."""
    gpus_per_cell: float = Field(default=0, ge=0, json_schema_extra=RESUMABLE)
    """GPUs of a run."""
    resamples: int = Field(default=1000, ge=100)
    """Resamples of the residuals for the intervals of the law's parameters."""
    seed: int = 0
    """Seed of every run, of the test noise and of the resamples."""

    @model_validator(mode="after")
    def _enough_cells(self) -> Self:
        cells = len(set(self.sizes)) * len(set(self.samples))
        if cells < LEAST_CELLS:
            raise ValueError(
                f"sizes, samples: {cells} cell{'s' if cells > 1 else ''}; a law of three parameters needs at least "
                f"{LEAST_CELLS}: give more --sizes or --samples"
            )
        return self

    @property
    def cells(self) -> list[Cell]:
        """The grid, cheapest first."""
        shapes = sorted({(int(d), int(n)) for d, n in (size.split("x") for size in self.sizes)})
        grid = [Cell(d, n, samples) for d, n in shapes for samples in sorted(set(self.samples))]
        return sorted(grid, key=lambda cell: cell.d_model**2 * cell.n_blocks * cell.samples)
