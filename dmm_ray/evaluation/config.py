"""The configuration of ``dmm evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from dmm_ray.config import Config
from dmm_ray.precision import PrecisionOption
from dmm_ray.subject.config import ModelSource

T = TypeVar("T")
OneOrMore = Annotated[
    tuple[T, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
]
"""A value may stand for a list of one."""
Sizes = OneOrMore[Annotated[int, Field(ge=1)]]


QUICK: dict[str, object] = {
    "mixture_sizes": (2048,),
    "analyser_sizes": (256,),
    "analyser_ranks": (16,),
    "sae_k": (16,),
    "sae_lr": (5e-3,),
    "sae_kinds": ("topk",),
    "sae_minutes": 0.75,
    "lm_documents": 60,
    "noise_seeds": 1,
    "samples": 3000,
}
"""Defaults with ``quick``: one size of each baseline, as the searches usually choose it on the demo's store."""


class EvaluateConfig(Config):
    """Compare a prior with a Gaussian, PCA, mixtures, sparse autoencoders and an untrained prior."""

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
    quick: bool = False
    """Skip the searches for sizes and options of the baselines, and take fewer samples and documents: about a minute
    on the demo's store. Fields that are given keep their values."""
    max_rows: int = Field(default=40_000, ge=1)
    """Test rows for the flow-matching loss, in whole documents."""
    train_rows: int = Field(default=400_000, ge=1)
    """Training rows that the baselines are fitted on, in whole documents."""
    validation_rows: int = Field(default=4_000, ge=1)
    """Validation rows that choose the sizes and options of mixtures and sparse autoencoders."""
    mixture_sizes: Sizes = (128, 512, 2048, 8192)
    """Numbers of diagonal Gaussians tried, rising until one is worse; at least 20 training rows for each are needed."""
    analyser_sizes: Sizes = (128, 512, 1024)
    """Numbers of factor analysers tried, likewise."""
    analyser_ranks: Sizes = (8, 16, 32, 64)
    """Factors of each that are tried, rising likewise, with the best number of analysers."""
    sae_latents: Sizes | None = None
    """Latents of the sparse autoencoders, one number or several to try; default 16, 8 and 32 for each dimension."""
    sae_k: Sizes = (16, 32, 64)
    """Latents that may be active in a row, one number or several to try."""
    sae_lr: OneOrMore[Annotated[float, Field(gt=0)]] = (5e-3, 2e-3, 1e-3)
    """Peak learning rates of the sparse autoencoders, one or several to try."""
    sae_kinds: OneOrMore[Literal["topk", "batch_topk"]] = ("topk", "batch_topk")
    """Sparse autoencoders to try: topk, batch_topk."""
    sae_samples: int = Field(default=600_000, ge=1)
    """Rows each of the two sparse autoencoders is trained on, repeats counted; trials see a sixth of that."""
    sae_minutes: float = Field(default=4.0, gt=0)
    """Time for both sparse autoencoders, about: trials are left out, and rows, where it is too short."""
    pretrained_sae: str | None = None
    """Folder or URI of a trained sparse autoencoder of this layer (cfg.json and safetensors), compared as well."""
    lm_documents: int = Field(default=100, ge=0)
    """Test documents for the delta LM loss; 0 skips it."""
    lm_levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.5, 0.7)
    """Noise levels of the delta LM loss of posterior means; the headline's 0.5 is always included, with samples too."""
    noise_seeds: int = Field(default=3, ge=1)
    """Draws of the noise, in the flow-matching loss and in the delta LM loss at u = 0.5; the same for all methods."""
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

    @model_validator(mode="before")
    @classmethod
    def _quick_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        try:
            quick = TypeAdapter(bool).validate_python(values.get("quick", False))
        except ValidationError:  # the field itself says what is wrong with it
            return values
        return {**QUICK, **values} if quick else values
