"""One pydantic model per verb: read from YAML and flags, unknown keys refused, errors in one line."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dmm_ray.errors import UserError
from dmm_ray.files import read_bytes


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, docstrings of fields shown in ``--help``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as ``field: what is wrong (got value)``."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "configuration"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field; `--help` lists them"
    if first["type"] == "missing":
        return f"{field}: required; give --{field.replace('_', '-')}"
    shown = repr(first["input"])
    return f"{field}: {message} (got {shown if len(shown) < 80 else shown[:77] + '...'})"


def load_yaml(uri: str) -> dict[str, Any]:
    """A YAML file's mapping. Raises UserError if it is missing, damaged or not a mapping."""
    try:
        value = yaml.safe_load(read_bytes(uri))
    except yaml.YAMLError as e:
        raise UserError(f"{uri}: not valid YAML ({' '.join(str(e).split())})") from e
    if not isinstance(value, dict):
        raise UserError(f"{uri}: a configuration file holds one mapping of fields to values")
    return value
