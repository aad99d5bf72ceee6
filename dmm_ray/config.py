"""Base of the configurations, one pydantic model per verb: read from YAML and flags, unknown keys rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from dmm_ray.errors import UserError
from dmm_ray.files import read_bytes

RESUMABLE: dict[str, JsonValue] = {"resumable": True}
"""Marks a field, by ``Field(json_schema_extra=RESUMABLE)``, that may change when a command is resumed: it does not
affect the results, or it is the location of something whose content is compared by hash."""


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys rejected, field docstrings shown in ``--help``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        """The fields that are groups, by name."""
        return {
            name: field.annotation
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
        }

    @classmethod
    def owners(cls) -> dict[str, str]:
        """The group of each field that may be given without its group's name: ``lr`` belongs to ``optimizer``."""
        return {name: group for group, kind in cls.groups().items() for name in kind.model_fields}

    @classmethod
    def nest(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` with the fields given without their group's name moved into their groups.

        Raises:
            UserError: a field is given both ways.
        """
        owners = cls.owners()
        found: dict[str, Any] = {}
        inside: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name in owners and name not in cls.model_fields:
                inside.setdefault(owners[name], {})[name] = value
            else:
                found[name] = value
        for group, fields in inside.items():
            given = found.get(group, {})
            if isinstance(given, Group):
                given = {name: getattr(given, name) for name in given.model_fields_set}
            if not isinstance(given, Mapping):
                continue  # pydantic reports the error
            if twice := fields.keys() & given.keys():
                name = min(twice)
                raise UserError(f"{name}: given twice, as {name} and as {group}.{name}; give one of them")
            found[group] = {**given, **fields}
        return found

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        found = cls.nest(values)
        for group in cls.groups():
            if cls.model_fields[group].is_required():
                found.setdefault(group, {})  # so that its missing fields are reported by their own names
        return found

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Like pydantic's; ``update`` too may name fields of groups without the group's name."""
        changes = self.nest(update or {})
        for group in self.groups().keys() & changes.keys():
            if isinstance(changes[group], Mapping):
                changes[group] = getattr(self, group).model_copy(update=changes[group])
        return super().model_copy(update=changes, deep=deep)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the results: the fields not marked ``RESUMABLE``, as JSON values by flag."""
        dumped = self.model_dump(mode="json")
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.json_schema_extra == RESUMABLE:
                continue
            if isinstance(value, Group):
                found |= value.identity()
            elif isinstance(value, Config):
                found |= {f"{name}.{key}": part for key, part in value.identity().items()}
            else:
                found[name] = dumped[name]
        return found


class Group(Config):
    """Fields of a configuration that belong together.

    In YAML files, flags and keyword arguments they may be given without the group's name, alongside the fields of the
    configuration that contains the group: ``--lr 0.001`` is ``--optimizer.lr 0.001``.
    """


def identity_as_saved(config: Config, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a configuration as an earlier version would have recorded it.

    Args:
        config: the requested configuration.
        saved: the identity recorded in the folder being resumed. Fields missing from it are omitted if ``config`` has
            their default.
    """
    holders = [config, *(getattr(config, group) for group in config.groups())]
    defaults = {
        name
        for holder in holders
        for name, field in type(holder).model_fields.items()
        if getattr(holder, name) == field.get_default()
    }
    return {k: v for k, v in config.identity().items() if k in saved or k not in defaults}


def refuse_other(out: str, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that this command asks for the same work as the one that started the folder.

    Args:
        out: the folder.
        saved: the ``Config.identity`` that its results were, or are being, made with.
        asked: the identity of this command.

    Raises:
        UserError: they differ; a single line names every differing field, both values and the remedy.

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
    """A value for an error line, with hashes shortened."""
    parts = value if isinstance(value, list) else [value]
    shown = [part[:12] if isinstance(part, str) and len(part) == 64 else str(part) for part in parts]
    return f"[{', '.join(shown)}]" if isinstance(value, list) else shown[0]


def one_line(error: ValidationError, model: type[Config] | None = None) -> str:
    """The first problem in a pydantic error as ``field: what is wrong (got value)``.

    Args:
        error: the error that pydantic raised.
        model: the configuration; if given, fields of its groups are named without the group's name.
    """
    first = error.errors()[0]
    loc = first["loc"]
    if model is not None and len(loc) > 1 and loc[0] in model.groups():
        loc = loc[1:]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and (not loc or (model is not None and loc[0] in model.groups())):
        return message  # from a check of several fields; it names them itself
    field = ".".join(map(str, loc)) or "configuration"
    if first["type"] == "extra_forbidden":
        message = "no such field; `--help` lists them"
    if first["type"] == "missing":
        return f"{field}: required; give --{field.replace('_', '-')}"
    shown = repr(first["input"])
    return f"{field}: {message} (got {shown if len(shown) < 80 else shown[:77] + '...'})"


def load_yaml(uri: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if the file is missing, not valid YAML or not a mapping."""
    try:
        value = yaml.safe_load(read_bytes(uri))
    except yaml.YAMLError as e:
        raise UserError(f"{uri}: not valid YAML ({' '.join(str(e).split())})") from e
    if not isinstance(value, dict):
        raise UserError(f"{uri}: a configuration file must contain a single mapping of fields to values")
    return value
