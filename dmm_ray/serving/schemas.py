"""Schemas of request and answer bodies, as documented by the HTTP API.

Types are strict: strings and booleans are not numbers; NaN, Infinity and unknown keys are refused. Validation of a list
stops at its first invalid element, so that a large invalid body costs no more than a valid one.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from dmm_ray.operations import (
    OPERATIONS,
    DenoiseArguments,
    EncodeArguments,
    Level,
    LogProbArguments,
    OperationArguments,
    OperationName,
    SampleArguments,
    VelocityErrorArguments,
)
from dmm_ray.precision import PrecisionOption
from dmm_ray.serving.config import MOST_ROWS

Finite = Annotated[float, Field(allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Row = Annotated[list[Finite], Field(fail_fast=True, max_length=MOST_ROWS)]
Matrix = Annotated[
    list[Row],
    Field(
        fail_fast=True,
        min_length=1,
        max_length=MOST_ROWS,
        description="Raw activations, d numbers per row.",
    ),
]
Ids = Annotated[list[Int64 | tuple[Int64, Int64]], Field(fail_fast=True, max_length=MOST_ROWS)]
Levels = Annotated[list[Level], Field(fail_fast=True, max_length=MOST_ROWS)]
Steps = Annotated[int, Field(ge=1, description="Grid intervals of the solver.")]
ROWS: list[Any] = [[0.1, -1.2, 0.7, 0.0], [0.4, 0.3, -0.5, 2.1]]


class StrictBody(BaseModel):
    """Base of every part of a request: strict types, no unknown keys."""

    # Collect unknown keys and refuse them below: "forbid" would create an error of about a kilobyte for each of them.
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
        """The JSON schema, which allows no unknown keys."""
        schema = handler.resolve_ref_schema(handler(core))
        schema["additionalProperties"] = False
        return schema


class Parameters(StrictBody):
    """Parameters common to all operations."""

    layer: int | None = Field(
        default=None, description="Block of the language model; required if the prior has several layers."
    )
    seed: Int64 = Field(default=0, description="Seed of the noise and the probes.")
    precision: PrecisionOption | None = Field(
        default=None, description="Precision of the network's products; null: the endpoint's."
    )


class LogProbParameters(Parameters, LogProbArguments):
    """Parameters of ``log_prob``."""


class VelocityErrorParameters(Parameters, VelocityErrorArguments):
    """Parameters of ``velocity_error``."""


class DenoiseParameters(Parameters, DenoiseArguments):
    """Parameters of ``denoise``."""


class SampleParameters(Parameters, SampleArguments):
    """Parameters of ``sample``."""


class EncodeParameters(Parameters, EncodeArguments):
    """Parameters of ``encode``."""


AnyParameters = (
    LogProbParameters | VelocityErrorParameters | DenoiseParameters | SampleParameters | EncodeParameters
)
PARAMETERS: dict[OperationName, type[AnyParameters]] = {
    "log_prob": LogProbParameters,
    "velocity_error": VelocityErrorParameters,
    "denoise": DenoiseParameters,
    "sample": SampleParameters,
    "encode": EncodeParameters,
}


class Body(StrictBody):
    """Fields common to all JSON requests."""

    model: str | None = Field(default=None, description="Name of a prior; null: the default one.")
    ids: Ids | None = Field(
        default=None,
        description="Ids of the rows, all integers or all [document, position] pairs: together with `seed` they "
        "determine the noise. null: 0, 1, ...",
    )


class RowsBody(Body):
    """A request with given rows."""

    activations: Matrix


class LogProbBody(LogProbParameters, RowsBody):
    """A request to ``log_prob``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"activations": ROWS, "steps": 32, "probes": 2, "seed": 0}]}
    )


class VelocityErrorBody(VelocityErrorParameters, RowsBody):
    """A request to ``velocity_error``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"activations": ROWS, "pairs": 8}]})


class DenoiseBody(DenoiseParameters, RowsBody):
    """A request to ``denoise``."""

    u: Level | Levels = Field(  # type: ignore[assignment]
        default=0.5, description="Noise level to restore from, 0 (data) to 1 (noise); one, or one per row."
    )

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"activations": ROWS, "u": 0.5, "steps": 10, "mode": "sample"}]}
    )


class SampleBody(SampleParameters, Body):
    """A request to ``sample``."""

    n: int = Field(ge=1, description="Rows to draw.")

    model_config = ConfigDict(json_schema_extra={"examples": [{"n": 2, "steps": 20, "seed": 0}]})


class EncodeBody(EncodeParameters, RowsBody):
    """A request to ``encode``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"activations": ROWS, "u": 0.1, "block": 0, "top": 5}]}
    )


AnyBody = LogProbBody | VelocityErrorBody | DenoiseBody | SampleBody | EncodeBody
Numbers = list[float | None]


def answer_model(kind: type[OperationArguments]) -> type[BaseModel]:
    """The model of an operation's JSON answer, built from its results."""
    fields: dict[str, Any] = {}
    for name, result in kind.RESULTS.items():
        one = list[int] if result.integer else list[float] if result.per_row != "one" else Numbers
        several = one if result.per_row == "one" else list[one]  # type: ignore[valid-type]
        optional = several | None if result.nullable else several
        fields[name] = (optional, Field(description=result.meaning))
    if kind is LogProbArguments:
        fields["evaluations"] = (int, Field(description="Network evaluations per row."))
    name = f"{kind.__name__.removesuffix('Arguments')}Answer"
    return create_model(name, __doc__=kind.__doc__, **fields)


class ErrorAnswer(BaseModel):
    """An error: one line that names the field and the remedy."""

    error: str


BODIES: tuple[type[AnyBody], ...] = (LogProbBody, VelocityErrorBody, DenoiseBody, SampleBody, EncodeBody)
ANSWERS = {name: answer_model(kind) for name, kind in OPERATIONS.items()}


def request_schema(body: type[BaseModel]) -> dict[str, Any]:
    """``body`` as an OpenAPI request body, with its examples and with all definitions inlined."""
    schema = body.model_json_schema()
    plain = _inlined(schema, schema.pop("$defs", {}))
    return {"required": True, "content": {"application/json": {"schema": plain}}}


def _inlined(node: Any, parts: dict[str, Any]) -> Any:
    """``node`` with each reference replaced by the definition in ``parts``."""
    if isinstance(node, list):
        return [_inlined(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(parts[node["$ref"].rpartition("/")[2]], parts)
    return {key: _inlined(value, parts) for key, value in node.items()}
