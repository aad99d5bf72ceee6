"""A prior's configuration, as saved in its ``config.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dmm_ray.config import RESUMABLE, Config
from dmm_ray.prior.base import BaseKind

FORMAT_VERSION: Literal[1] = 1


class PriorConfig(Config):
    """Shape and provenance of an :class:`~dmm_ray.prior.model.ActivationPrior`."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of the folder's layout."""
    d: int = Field(gt=0)
    """Width of an activation."""
    layers: tuple[Annotated[int, Field(ge=-1)], ...] = Field(min_length=1)
    """Block numbers of the subject whose outputs are modelled; -1 is the input of block 0."""
    subject_layers: int = Field(default=1, gt=0)
    """Number of blocks of the subject; scales the layer condition of a multi-layer prior."""
    depth_offset: Literal[0, 1] = 0
    """Added to a layer's number in its condition: 1 for a prior of block inputs, which are numbered by their block."""
    layer_conditioned: bool = False
    """Whether a single-layer prior has a layer condition; a multi-layer prior always has one."""
    d_model: int = Field(gt=0, multiple_of=2)
    """Residual width of the denoiser."""
    d_mlp: int = Field(gt=0)
    """Hidden width of a denoiser block."""
    n_blocks: int = Field(gt=0)
    """Number of denoiser blocks."""
    base: BaseKind = "none"
    """Closed-form velocity that the network's output is added to; its tensors are in the weight file."""
    variance_floor: float = Field(gt=0)
    """The normaliser raises smaller variances to this value, in squared activation units."""
    subject: dict[str, Any] = Field(default={}, json_schema_extra=RESUMABLE)
    """Which language model the activations come from: id, revision, hashes."""
    split: dict[str, Any] = Field(default={})
    """How documents were split into train, validation and test."""
    training: dict[str, Any] = Field(default={}, json_schema_extra=RESUMABLE)
    """How the prior was trained: samples seen, seed, recipe, store."""

    @model_validator(mode="after")
    def _layers_distinct(self) -> PriorConfig:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers: must be distinct")
        if self.base != "none" and self.multi_layer:
            raise ValueError(
                "base: not available for a prior of several layers; model one layer, or use base none"
            )
        return self

    @property
    def multi_layer(self) -> bool:
        """Whether the denoiser is conditioned on the layer."""
        return self.layer_conditioned or len(self.layers) > 1

    def depth(self, layer: int) -> float:
        """The layer condition: the depth of ``layer`` in the subject, from 0 (first block) to 1 (last)."""
        return (layer + self.depth_offset) / max(self.subject_layers - 1, 1)
