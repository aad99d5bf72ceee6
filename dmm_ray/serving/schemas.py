"""Bodies of requests and answers, as the HTTP API documents them.

Types are strict: a string or a boolean is no number, JSON's NaN and Infinity are refused, unknown keys too.
Reading stops at the first wrong element, so that a large wrong body costs no more than a right one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from dmm_ray.serving.config import MOST_ROWS

Operation = Literal["log_prob", "denoise", "sample", "encode"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Row = Annotated[list[Finite], Field(fail_fast=True, max_length=MOST_ROWS)]
Matrix = Annotated[
    list[Row],
    Field(
        fail_fast=True,
        min_length=1,
        max_length=MOST_ROWS,
        description="Raw activations, one row of d numbers each.",
    ),
]
Ids = Annotated[list[Int64 | tuple[Int64, Int64]], Field(fail_fast=True, max_length=MOST_ROWS)]
Level = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, description="Grid intervals of the solver.")]
ROWS: list[Any] = [[0.1, -1.2, 0.7, 0.0], [0.4, 0.3, -0.5, 2.1]]


class StrictBody(BaseModel):
    """Base of every part of a request: strict types, unknown keys refused."""

    # Unknown keys are collected and refused below: "forbid" makes an error of a kilobyte for each of them.
    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="after")
    def _no_unknown_keys(self) -> Self:
        for name in self.model_extra or ():
            raise PydanticCustomError(
                "extra_forbidden", "{name}: unknown field; /docs lists the fields", {"name": name[:80]}
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema of what is accepted: no unknown keys."""
        schema = handler.resolve_ref_schema(handler(core))
        schema["additionalProperties"] = False
        return schema


class Arguments(StrictBody):
    """What an operation may be told beside its rows."""

    OPERATION: ClassVar[Operation]

    layer: int | None = Field(
        default=None, description="Block of the language model; needed by a prior of several layers."
    )
    seed: Int64 = Field(default=0, description="Of the noise and the probes.")


class LogProb(Arguments):
    """How likely is each row, in nats?"""

    OPERATION = "log_prob"
    steps: Steps = 32
    probes: int = Field(
        default=2, ge=0, description="Trace probes of a row at each step; 0: exact trace, d passes a step."
    )


class Denoise(Arguments):
    """What is a natural activation near each row? Noise is added to level u and taken away again."""

    OPERATION = "denoise"
    u: Level = Field(default=0.5, description="Noise level, 0 data to 1 noise.")
    steps: Steps = 10
    mode: Literal["sample", "mean"] = Field(default="sample", description="`mean`: one posterior-mean step.")


class Sample(Arguments):
    """Draw n activations."""

    OPERATION = "sample"
    steps: Steps = 20


class Encode(Arguments):
    """The denoiser's own hidden units (meta-neurons) for each row at a low noise level."""

    OPERATION = "encode"
    u: Level = Field(default=0.1, description="Noise level, 0 data to 1 noise.")
    block: int | None = Field(default=None, ge=0, description="Block of the denoiser; null: all of them.")


class Body(Arguments):
    """What every JSON request may say."""

    model: str | None = Field(default=None, description="Name of a prior; null: the default one.")
    ids: Ids | None = Field(
        default=None,
        description="Names of the rows, all integers or all [document, position] pairs: with `seed` they fix "
        "the noise. null: 0, 1, ...",
    )


class RowsBody(Body):
    """A request about given rows."""

    activations: Matrix


class LogProbBody(LogProb, RowsBody):
    """How likely is each row, in nats?"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"activations": ROWS, "steps": 32, "probes": 2, "seed": 0}]}
    )


class DenoiseBody(Denoise, RowsBody):
    """What is a natural activation near each row? Noise is added to level u and taken away again."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"activations": ROWS, "u": 0.5, "steps": 10, "mode": "sample"}]}
    )


class SampleBody(Sample, Body):
    """Draw n activations."""

    n: int = Field(ge=1, description="Rows to draw.")

    model_config = ConfigDict(json_schema_extra={"examples": [{"n": 2, "steps": 20, "seed": 0}]})


class EncodeBody(Encode, RowsBody):
    """The denoiser's own hidden units (meta-neurons) for each row at a low noise level."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"activations": ROWS, "u": 0.1, "block": 0}]})


Numbers = list[float | None]


class LogProbAnswer(BaseModel):
    """Log-probabilities of the raw rows, in nats."""

    nats: Numbers
    nats_per_dim: Numbers
    stderr: Numbers | None = Field(
        description="Standard error of nats from the probes; 0 with an exact trace, null from a single probe."
    )
    percentile: Numbers | None = Field(
        description="One-sided, of the log-probability; null without calibration."
    )
    latent_percentile: Numbers | None = Field(
        description="Two-sided, of the latent norm; null without calibration."
    )
    combined_percentile: Numbers | None = Field(
        description="Of the least of the two and of the row's own norm, the one to use; null without calibration."
    )
    evaluations: int = Field(description="Network evaluations a row.")


class ActivationsAnswer(BaseModel):
    """Raw activations."""

    activations: list[list[float]]


class FeaturesAnswer(BaseModel):
    """Meta-neurons of each row."""

    features: list[list[float]]


class ErrorAnswer(BaseModel):
    """Every failure: one line that names the field and the remedy."""

    error: str


BODIES: tuple[tuple[type[Body], type[BaseModel]], ...] = (
    (LogProbBody, LogProbAnswer),
    (DenoiseBody, ActivationsAnswer),
    (SampleBody, ActivationsAnswer),
    (EncodeBody, FeaturesAnswer),
)


def request_schema(body: type[BaseModel]) -> dict[str, Any]:
    """``body`` as an OpenAPI request body, its examples included and its parts written out in place."""
    schema = body.model_json_schema()
    plain = _inlined(schema, schema.pop("$defs", {}))
    return {"required": True, "content": {"application/json": {"schema": plain}}}


def _inlined(node: Any, parts: dict[str, Any]) -> Any:
    """``node`` with each reference to one of ``parts`` replaced by that part."""
    if isinstance(node, list):
        return [_inlined(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(parts[node["$ref"].rpartition("/")[2]], parts)
    return {key: _inlined(value, parts) for key, value in node.items()}
