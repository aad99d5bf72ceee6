"""Request and answer bodies of the text routes, and the results that the subject's deployment returns to them."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dmm_ray.operations import Level
from dmm_ray.serving.schemas import (
    Finite,
    Int64,
    LogProbParameters,
    Matrix,
    Row,
    SampleParameters,
    Steps,
    StrictBody,
)

MOST_LENS_ROWS = 64
PriorName = Annotated[str | None, Field(description="Name of a prior; null: the default one.")]
Text = Annotated[str, Field(min_length=1)]


class ScoreTextBody(LogProbParameters):
    """Score the language model's activation at each token of a text."""

    text: Text
    model: PriorName = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Once upon a time", "layer": None}]})


class TokenScore(BaseModel):
    """A token of a text."""

    text: str = Field(description="Its characters, or its name for a special token.")
    start: int = Field(description="Offset of its first character in the text, in Unicode code points.")
    end: int = Field(
        description="Offset of the character after its last one; equal to `start` for a special token."
    )
    nats: float | None = Field(
        default=None, description="Log-probability of its activation; null at position 0."
    )
    percentile: float | None = Field(
        default=None,
        description="Percentage of natural activations that are less likely; null without calibration.",
    )


class ScoreTextAnswer(BaseModel):
    """All tokens of the text, including position 0."""

    tokens: list[TokenScore]


class GenerateBody(StrictBody):
    """Generate text with a layer steered along a direction.

    At each position that predicts a new token, the layer's output is moved by `strength` mean activation norms along
    the direction. With `project` it is then noised to level `u` and denoised, which brings it back to where natural
    activations lie.
    """

    prompt: Text
    direction: str | Row | None = Field(
        default=None, description="Name of one of this endpoint's directions, or d numbers; null: none."
    )
    strength: Annotated[Finite, Field(ge=-100, le=100, description="In mean activation norms.")] = 0.3
    u: Level = Field(default=0.5, description="Noise level of the projection, 0 (data) to 1 (noise).")
    project: bool = True
    steps: Steps = 10
    max_tokens: int = Field(default=64, ge=1, description="Maximum number of new tokens.")
    temperature: Annotated[Finite, Field(ge=0, le=100, description="0: the likeliest token.")] = 0.0
    seed: Int64 = Field(default=0, description="Seed of the projection's noise and of the sampled tokens.")
    layer: int | None = Field(default=None, description="Block to steer; null: the direction's own.")
    model: PriorName = None
    stream: bool = Field(
        default=False, description="Answer with server-sent events: one `token` each, then `done`."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "Once upon a time", "direction": "happy", "strength": 0.3, "u": 0.5}]
        }
    )


class TokenEvent(BaseModel):
    """A newly generated token."""

    id: int
    text: str = Field(description="The characters that it completes; empty if it leaves one incomplete.")


class NewToken(TokenEvent):
    """A generated token."""

    nats: float = Field(description="Its -log p under the language model without steering.")


class GenerateAnswer(BaseModel):
    """The generated text, without the prompt."""

    text: str
    tokens: list[NewToken]
    nll: float | None = Field(description="Mean of the tokens' nats; null if there are none.")
    finish: Literal["stop", "length"] = Field(
        description="`stop`: the model ended its text; `length`: a limit was reached."
    )


class NearestTokensBody(SampleParameters):
    """Find the tokens nearest to activations, through the model's final norm and unembedding (logit lens).

    The activations are given, or `n` samples of the prior.
    """

    activations: Matrix | None = Field(default=None, max_length=MOST_LENS_ROWS)
    n: int | None = Field(default=None, ge=1, le=MOST_LENS_ROWS, description="Rows to draw instead.")
    top: int = Field(default=5, ge=1, le=100, description="Tokens per row.")
    model: PriorName = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"n": 4, "top": 5, "seed": 0}]})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.activations is None) == (self.n is None):
            raise PydanticCustomError("one_source", "activations, n: give exactly one of the two")
        return self


class NearToken(BaseModel):
    """A token near an activation."""

    id: int
    text: str
    probability: float = Field(
        description="Its probability under the model if the activation were its last block's output."
    )


class NearestTokensAnswer(BaseModel):
    """The likeliest tokens of each row, likeliest first."""

    rows: list[list[NearToken]]


class DirectionInfo(BaseModel):
    """A direction that `generate` takes by name."""

    name: str
    layer: int | None = Field(description="The block it belongs to; null: any.")


class DirectionsAnswer(BaseModel):
    """The endpoint's directions."""

    directions: list[DirectionInfo]


class ModelInfo(BaseModel):
    """A prior."""

    name: str
    d: int = Field(description="Width of an activation.")
    layers: list[int] = Field(description="Blocks of the language model that it models.")
    precision: str = Field(description="Precision of its matrix products: float32 or bfloat16.")


class SubjectInfo(BaseModel):
    """The language model of the text routes."""

    name: str
    layers: int = Field(description="Number of blocks.")
    context: int = Field(description="Maximum number of tokens in a text.")
    generates: bool = Field(description="Whether it can generate text; tried when it is loaded.")
    priors: list[str] = Field(description="Names of the priors of its activations.")
    directions: list[DirectionInfo]


class ModelsAnswer(BaseModel):
    """The priors and the language model of this endpoint."""

    models: list[ModelInfo] = Field(description="The priors, the default one first.")
    subject: SubjectInfo | None = Field(description="null: no language model is attached, so no text routes.")


class TextRows(NamedTuple):
    """The tokens of a text and a layer's activations."""

    tokens: list[TokenScore]
    """Without nats and percentiles."""
    layer: int
    activations: np.ndarray
    """Activations of all tokens but the first, float32 (tokens - 1, d)."""


class Ended(NamedTuple):
    """The last item of a generation, after its tokens."""

    nats: list[float]
    """``-log p`` of each token under the language model without steering."""
    finish: Literal["stop", "length"]
