"""Bodies of requests and answers of the text routes, and what the subject's process tells the HTTP side."""

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
    """How natural is the language model's internal state at each token of a text?"""

    text: Text
    model: PriorName = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Once upon a time", "layer": None}]})


class TokenScore(BaseModel):
    """A token of a text."""

    text: str = Field(description="Its characters; for a special token, its name.")
    start: int = Field(description="First character in the text, in Unicode code points.")
    end: int = Field(description="The character after its last one; as `start` for a special token.")
    nats: float | None = Field(
        default=None, description="Log-probability of its activation; null at position 0."
    )
    percentile: float | None = Field(
        default=None,
        description="Per cent of natural activations that are less likely; null without calibration.",
    )


class ScoreTextAnswer(BaseModel):
    """Every token of the text, position 0 included."""

    tokens: list[TokenScore]


class GenerateBody(StrictBody):
    """What does the language model write when a layer is steered along a direction?

    At each position that predicts a new token the layer's output moves by `strength` mean activation norms along the
    direction; with `project` it is then brought back to where natural activations lie: noised to level `u`, denoised.
    """

    prompt: Text
    direction: str | Row | None = Field(
        default=None, description="Name of a direction of this endpoint, or its d numbers; null: none."
    )
    strength: Annotated[Finite, Field(ge=-100, le=100, description="In mean activation norms.")] = 0.3
    u: Level = Field(default=0.5, description="Noise level of the projection, 0 data to 1 noise.")
    project: bool = True
    steps: Steps = 10
    max_tokens: int = Field(default=64, ge=1, description="Most new tokens.")
    temperature: Annotated[Finite, Field(ge=0, le=100, description="0: the likeliest token.")] = 0.0
    seed: Int64 = Field(default=0, description="Of the projection's noise and of the drawn tokens.")
    layer: int | None = Field(default=None, description="Block to steer; null: the direction's own.")
    model: PriorName = None
    stream: bool = Field(default=False, description="Answer by server-sent events: `token`s, then `done`.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "Once upon a time", "direction": "happy", "strength": 0.3, "u": 0.5}]
        }
    )


class TokenEvent(BaseModel):
    """A new token, as it comes."""

    id: int
    text: str = Field(description="The characters it completes; empty inside a character of several tokens.")


class NewToken(TokenEvent):
    """A generated token."""

    nats: float = Field(description="-log p of it under the language model without steering.")


class GenerateAnswer(BaseModel):
    """The generated text, without the prompt."""

    text: str
    tokens: list[NewToken]
    nll: float | None = Field(description="Mean of the tokens' nats; null if there is none.")
    finish: Literal["stop", "length"] = Field(description="The model ended its text, or a limit was reached.")


class NearestTokensBody(SampleParameters):
    """Which tokens are activations nearest to, read through the model's final norm and unembedding (logit lens)?

    Of given activations, or of `n` samples of the prior.
    """

    activations: Matrix | None = Field(default=None, max_length=MOST_LENS_ROWS)
    n: int | None = Field(default=None, ge=1, le=MOST_LENS_ROWS, description="Rows to draw instead.")
    top: int = Field(default=5, ge=1, le=100, description="Tokens a row.")
    model: PriorName = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"n": 4, "top": 5, "seed": 0}]})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.activations is None) == (self.n is None):
            raise PydanticCustomError("one_source", "activations, n: exactly one of the two is needed")
        return self


class NearToken(BaseModel):
    """A token that an activation is near to."""

    id: int
    text: str
    probability: float = Field(description="The model's, if this were its last block's output.")


class NearestTokensAnswer(BaseModel):
    """For each row the likeliest tokens, the likeliest first."""

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
    precision: str = Field(description="Of its matrix products: float32 or bfloat16.")


class SubjectInfo(BaseModel):
    """The language model of the text routes."""

    name: str
    layers: int = Field(description="How many blocks it has.")
    context: int = Field(description="Most tokens of a text.")
    generates: bool = Field(description="Whether text can be generated with it: tried when it was loaded.")
    priors: list[str] = Field(description="Names of the priors of its activations.")
    directions: list[DirectionInfo]


class ModelsAnswer(BaseModel):
    """What this endpoint holds."""

    models: list[ModelInfo] = Field(description="The priors, the default one first.")
    subject: SubjectInfo | None = Field(description="null: no language model is attached, no text routes.")


class TextRows(NamedTuple):
    """What a layer sees of a text."""

    tokens: list[TokenScore]
    """Without nats and percentiles."""
    layer: int
    activations: np.ndarray
    """Of all tokens but the first, float32 (tokens - 1, d)."""


class Ended(NamedTuple):
    """The last item of a generation, after its tokens."""

    nats: list[float]
    """Of each token under the language model without steering."""
    finish: Literal["stop", "length"]
