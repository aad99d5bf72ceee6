"""Ray Data actors that work on one unit at a time: only a small result travels back."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dmm_ray.errors import UserError
from dmm_ray.files import WRITE_REMEDIES
from dmm_ray.units.unit import Unit


class UnitActor(ABC):
    """Writes into the folder ``out``. Bad input comes back as an error row: Ray wraps what is raised.

    Once such a row is out this actor writes nothing more, in no thread: what it left over can be removed then. (Others
    may be writing still when the run ends; what they leave over the next run removes.)
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self._writing = threading.Lock()
        self._failed: str | None = None

    @abstractmethod
    def work(self, unit: Unit) -> dict[str, Any]:
        """Do one unit: its small result, with the ``rows`` it has."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """The result of the one unit of ``batch`` as JSON, or an ``error``."""
        try:
            result = self.work(Unit(*(int(batch[name][0]) for name in Unit._fields)))
        except UserError as e:
            result = {"error": self._stop(str(e))}
        except OSError as e:
            if e.errno not in WRITE_REMEDIES:
                raise
            result = {"error": self._stop(f"out: {self.out}: {WRITE_REMEDIES[e.errno]}")}
        return {"result": [json.dumps(result)]}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time writes. Raises UserError, the first failure again, after a failure."""
        with self._writing:
            if self._failed is not None:
                raise UserError(self._failed)
            yield

    def _stop(self, error: str) -> str:
        """Let nothing more be written; the first error."""
        with self._writing:
            self._failed = self._failed or error
            return self._failed
