"""What a prior is, as saved in its ``config.json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dmm_ray.config import Config

FORMAT_VERSION: Literal[1] = 1


class PriorConfig(Config):
    """Shape and provenance of an :class:`~dmm_ray.prior.model.ActivationPrior`."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of the folder's layout."""
    d: int = Field(gt=0)
    """Width of an activation."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Block numbers of the subject whose outputs are modelled."""
    subject_layers: int = Field(default=1, gt=0)
    """Number of blocks of the subject; scales the layer condition of a multi-layer prior."""
    d_model: int = Field(gt=0, multiple_of=2)
    """Residual width of the denoiser."""
    d_mlp: int = Field(gt=0)
    """Hidden width of a denoiser block."""
    n_blocks: int = Field(gt=0)
    """Number of denoiser blocks."""
    variance_floor: float = Field(gt=0)
    """Variances below this are raised to it by the normaliser, in squared activation units."""
    subject: dict[str, Any] = Field(default={})
    """Which language model the activations come from: id, revision, hashes."""
    split: dict[str, Any] = Field(default={})
    """How documents were split into train, validation and test."""
    training: dict[str, Any] = Field(default={})
    """How the prior was trained: samples seen, seed, recipe, store."""

    @model_validator(mode="after")
    def _layers_distinct(self) -> PriorConfig:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers: each layer once")
        return self

    @property
    def multi_layer(self) -> bool:
        """Whether the denoiser is conditioned on the layer."""
        return len(self.layers) > 1
