"""Ray Data actors that work on one unit at a time: only a small result travels back."""

from __future__ import annotations

import json
import logging
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from dmm_ray.errors import UserError
from dmm_ray.files import WRITE_REMEDIES
from dmm_ray.units.unit import Unit

logger = logging.getLogger(__name__)


class UnitActor(ABC):
    """Writes into the folder ``out``. What is raised comes back as an error row: Ray would make a page of it.

    Once such a row is out this actor writes nothing more, in no thread: what it left over can be removed then. (Others
    may be writing still when the run ends; what they leave over the next run removes.)
    """

    LESS: ClassVar[str] = ""
    """The option that makes a unit's work take less memory."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._writing = threading.Lock()
        self._failed: str | None = None

    @abstractmethod
    def work(self, unit: Unit) -> dict[str, Any]:
        """Do one unit: its small result, with the ``rows`` it has."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """The result of the one unit of ``batch`` as JSON.

        Or an ``error``, with a ``trace`` where it is not the user's: a fault of a model's code, a library's or ours.
        """
        unit = Unit(*(int(batch[name][0]) for name in Unit._fields))
        try:
            result = self.work(unit)
        except UserError as e:
            result = {"error": self._stop(str(e))}
        except Exception as e:
            if isinstance(e, OSError) and e.errno in WRITE_REMEDIES:
                result = {"error": self._stop(f"out: {self.out}: {WRITE_REMEDIES[e.errno]}")}
            else:
                logger.exception("unit %d failed", unit.unit)  # into the worker's own log
                result = {"error": self._stop(self._fault(unit, e)), "trace": traceback.format_exc()}
        return {"result": [json.dumps(result)]}

    def _fault(self, unit: Unit, e: Exception) -> str:
        """One line on an exception that nobody foresaw."""
        where = f"unit {unit.unit} (documents {unit.first} to {unit.stop - 1})"
        if "OutOfMemory" in type(e).__name__:
            return f"{where}: out of GPU memory; give a smaller {self.LESS} (the same command resumes)"
        return f"{where}: {type(e).__name__}: {' '.join(str(e).split())[:300] or 'no message'}"

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
