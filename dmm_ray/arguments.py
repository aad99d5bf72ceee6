"""Conversion of numeric arguments to plain Python numbers; numpy and torch scalars are accepted."""

from __future__ import annotations

import operator
from typing import Any

from dmm_ray.errors import UserError


def as_integer(name: str, value: Any, least: int | None = None) -> int:
    """Convert an integer argument to ``int``.

    Args:
        name: name of the argument, for the error message.
        value: an integer of any type; floats are rejected, even integral ones.
        least: smallest value allowed.

    Raises:
        UserError: ``value`` is not an integer or is less than ``least``.

    Example:
        >>> import numpy as np
        >>> as_integer("steps", np.int64(4), least=1)
        4
    """
    try:
        number = operator.index(value)
    except TypeError as e:
        raise UserError(f"{name}: expected an integer (got {value!r})") from e
    if least is not None and number < least:
        raise UserError(f"{name}: at least {least} is needed (got {number})")
    return number


def as_number(name: str, value: Any) -> float:
    """Convert a numeric argument to ``float``. Raises UserError unless it is a single number."""
    try:
        if isinstance(value, str):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name}: expected a number (got {value!r})") from e
