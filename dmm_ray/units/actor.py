"""Ray Data actors that process one unit per call and return only a small result, or a failure as text."""

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
    """Writes into the folder ``out``. Exceptions are returned as error rows, because Ray would wrap them in its own
    tracebacks and cannot pickle every exception.

    Once an error row has been returned, no thread of this actor writes anything more, so its temporary files can be
    removed. (Other actors may still be writing when the run ends; the next run removes what they leave behind.)
    """

    memory_options: ClassVar[str] = ""
    """Command-line options that reduce an actor's memory use, named in failure messages."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._writing = threading.Lock()
        self._failed: dict[str, Any] | None = None

    @abstractmethod
    def work(self, unit: Unit) -> dict[str, Any]:
        """Process one unit and return its small result, which includes its number of ``rows``."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """The result of the single unit in ``batch`` as JSON; for a failure an ``error``, with ``unit`` and ``trace``
        unless it is about bad input."""
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
        """Let one thread write at a time. After a failure, raises UserError with the first failure."""
        with self._writing:
            if self._failed is not None:
                raise UserError(self._failed["error"])
            yield

    def _stop(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Prevent any further writing and return the first failure."""
        with self._writing:
            self._failed = self._failed or failure
            return self._failed
