"""One pydantic model per verb: read from YAML and flags, unknown keys refused, errors in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from dmm_ray.errors import UserError
from dmm_ray.files import read_bytes

RESUMABLE: dict[str, JsonValue] = {"resumable": True}
"""Mark of a field, ``Field(json_schema_extra=RESUMABLE)``, that a resumed command may change: it decides no result, or
it says where something lies whose content is compared by its hash."""


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, docstrings of fields shown in ``--help``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """All that decides the result, by flag: the fields, as JSON values, that are not marked ``RESUMABLE``."""
        dumped = self.model_dump(mode="json")
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.json_schema_extra == RESUMABLE:
                continue
            if isinstance(value, Config):
                found |= {f"{name}.{key}": part for key, part in value.identity().items()}
            else:
                found[name] = dumped[name]
        return found


def identity_as_saved(config: Config, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a configuration as an earlier version would have recorded it.

    Args:
        config: what is asked for.
        saved: the identity in the folder that is resumed. A field that it lacks is left out where it has its default.
    """
    fields = type(config).model_fields
    added = {
        name for name in fields.keys() - saved.keys() if getattr(config, name) == fields[name].get_default()
    }
    return {name: value for name, value in config.identity().items() if name not in added}


def refuse_other(out: str, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that the work begun in a folder is the work that is asked for now.

    Args:
        out: the folder.
        saved: what its results were, or are being, made with (``Config.identity``).
        asked: the same of this command.

    Raises:
        UserError: they differ; one line names every field that does, both values and the remedy.

    Example:
        >>> refuse_other("runs/prior", {"seed": 0, "batch": 256}, {"seed": 1, "batch": 256})
        Traceback (most recent call last):
        ...
        dmm_ray.errors.UserError: seed: runs/prior was made with 0, not 1; choose another --out, or give the same \
values to resume
    """
    names = [*asked, *(name for name in saved if name not in asked)]
    differing = [name for name in names if saved.get(name) != asked.get(name)]
    if not differing:
        return
    first, *others = [
        (name, f"{_shown(saved.get(name))}, not {_shown(asked.get(name))}") for name in differing
    ]
    parts = [f"{first[0]}: {out} was made with {first[1]}", *(f"{name}: {values}" for name, values in others)]
    raise UserError("; ".join([*parts, "choose another --out, or give the same values to resume"]))


def _shown(value: object) -> str:
    """A value for an error line; hashes cut."""
    parts = value if isinstance(value, list) else [value]
    shown = [part[:12] if isinstance(part, str) and len(part) == 64 else str(part) for part in parts]
    return f"[{', '.join(shown)}]" if isinstance(value, list) else shown[0]


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
