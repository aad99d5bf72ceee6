"""Numbers that callers give, as plain ones: integers and floats of numpy and torch are as good as Python's."""

from __future__ import annotations

import operator
from typing import Any

from dmm_ray.errors import UserError


def as_integer(name: str, value: Any, least: int | None = None) -> int:
    """An argument that counts something, as an int.

    Args:
        name: of the argument, for the error.
        value: an integer of any type; a float is none, not even a whole one.
        least: the smallest that is allowed.

    Raises:
        UserError: not an integer, or less than ``least``.

    Example:
        >>> import numpy as np
        >>> as_integer("steps", np.int64(4), least=1)
        4
    """
    try:
        number = operator.index(value)
    except TypeError as e:
        raise UserError(f"{name}: an integer is needed (got {value!r})") from e
    if least is not None and number < least:
        raise UserError(f"{name}: at least {least} is needed (got {number})")
    return number


def as_number(name: str, value: Any) -> float:
    """An argument that measures something, as a float. Raises UserError for what is not one number."""
    try:
        if isinstance(value, str):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name}: a number is needed (got {value!r})") from e
