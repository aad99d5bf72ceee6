"""Ray Data actors that work on one unit at a time: only a small result, or a failure as text, travels back."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from dmm_ray.errors import UserError
from dmm_ray.failures import Failure
from dmm_ray.files import WRITE_REMEDIES
from dmm_ray.units.unit import Unit


class UnitActor(ABC):
    """Writes into the folder ``out``. What is raised comes back as an error row: Ray would wrap it in its own traces,
    and could not pickle every exception.

    Once such a row is out this actor writes nothing more, in no thread: what it left over can be removed then. (Others
    may be writing still when the run ends; what they leave over the next run removes.)
    """

    memory_options: ClassVar[str] = ""
    """Options of the command that lower an actor's need for memory, for the line of a failure."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._writing = threading.Lock()
        self._failed: dict[str, Any] | None = None

    @abstractmethod
    def work(self, unit: Unit) -> dict[str, Any]:
        """Do one unit: its small result, with the ``rows`` it has."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """The result of the one unit of ``batch`` as JSON, or an ``error``, with the ``unit`` and its ``trace`` unless
        it is about bad input."""
        unit = Unit(*(int(batch[name][0]) for name in Unit._fields))
        try:
            result = self.work(unit)
        except Exception as e:  # noqa: BLE001 - whatever a model, a tokenizer or a file system raises
            result = self._stop(self._failure(unit, e))
        return {"result": [json.dumps(result)]}

    def _failure(self, unit: Unit, error: Exception) -> dict[str, Any]:
        """The result of a unit that failed."""
        if isinstance(error, UserError):
            return {"error": str(error)}
        if isinstance(error, OSError) and error.errno in WRITE_REMEDIES:
            return {"error": f"out: {self.out}: {WRITE_REMEDIES[error.errno]}"}
        failure = Failure.of(error, self.memory_options)
        return {"error": failure.cause, "trace": failure.trace, "unit": unit.unit}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time writes. Raises UserError, the first failure again, after a failure."""
        with self._writing:
            if self._failed is not None:
                raise UserError(self._failed["error"])
            yield

    def _stop(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Let nothing more be written; the first failure."""
        with self._writing:
            self._failed = self._failed or failure
            return self._failed
