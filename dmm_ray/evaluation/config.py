"""The configuration of ``dmm evaluate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dmm_ray.config import Config
from dmm_ray.precision import PrecisionOption
from dmm_ray.subject.config import ModelSource


class EvaluateConfig(Config):
    """Compare a prior with a Gaussian, PCA, a mixture, a sparse autoencoder and an untrained prior."""

    prior: str
    """Prior folder or hub id."""
    activations: str
    """Activation store for fitting the baselines and for the test rows; usually the one the prior was trained on."""
    out: str
    """Folder for summary.json, report.html and plots; existing results in it are replaced."""
    text: str | list[str] | None = None
    """Text of the store, if it has moved; defaults to the paths in the store's manifest."""
    layer: int | None = None
    """Layer to evaluate; required if the prior models several."""
    max_rows: int = Field(default=40_000, ge=1)
    """Test rows for the flow-matching loss, in whole documents."""
    train_rows: int = Field(default=400_000, ge=1)
    """Training rows that the baselines are fitted on, in whole documents."""
    validation_rows: int = Field(default=4_000, ge=1)
    """Validation rows for choosing the mixture's size."""
    mixture_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128, 512, 2048), min_length=1)
    """Numbers of components to try; the best on the validation rows is reported."""
    sae_latents: int | None = Field(default=None, ge=1)
    """Latents of the sparse autoencoders; defaults to 16 per dimension."""
    sae_k: int = Field(default=16, ge=1)
    """Latents that may be active per row."""
    sae_samples: int = Field(default=600_000, ge=1)
    """Training rows for each of the two sparse autoencoders, counting repeats."""
    lm_documents: int = Field(default=100, ge=0)
    """Test documents for the delta LM loss; 0 skips it."""
    lm_levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.5, 0.7)
    """Noise levels of the delta LM loss of posterior means; the headline's 0.5 is always included, with samples too."""
    nll_rows: int = Field(default=512, ge=0)
    """Test rows for the likelihood; 0 skips it."""
    nll_steps: int = Field(default=32, ge=1)
    """Midpoint intervals for the prior's likelihood, two evaluations each."""
    nll_probes: int = Field(default=2, ge=0)
    """Rademacher probes for its trace; 0 computes it exactly."""
    samples: int = Field(default=5_000, ge=0)
    """Rows drawn from each method for the Frechet distance and the two-sample test; 0 skips both."""
    sample_steps: int = Field(default=20, ge=1)
    """Midpoint intervals for the prior's samples, two evaluations each."""
    two_sample_rows: int = Field(default=2_000, ge=10)
    """Rows per side of the two-sample test."""
    unseen_prefix: bool = True
    """Also report on rows with unseen prefixes; requires reading and tokenizing all the training text."""
    seed: int = 0
    """Seed of noise, draws and fits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""
    precision: PrecisionOption = "auto"
    """Number format of the prior's matrix products; states and sums are float32, as are the baselines. auto is bfloat16
    on devices with fast bfloat16, else float32."""
    compute_dtype: PrecisionOption = "auto"
    """Number format of the language model's computation. auto is that of the store, or float32 if that is slow on the
    device."""
    subject: ModelSource = ModelSource()
    """The language model, if it has moved."""
