"""The Ray Data actor around an ``Engine``: only a small result travels back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.engine import Engine, Task
from dmm_ray.activations.units import Unit
from dmm_ray.errors import UserError
from dmm_ray.files import WRITE_MENDS


class Extractor:
    """Holds an engine. Bad input comes back as an error row: Ray wraps what is raised here."""

    def __init__(self, task: Task, corpus: Corpus) -> None:
        self.engine = Engine(task, corpus)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Do the one unit of ``batch``: JSON with its ``rows``, how many documents ``failed`` and the last ``failure``,
        or an ``error``."""
        unit = Unit(*(int(batch[name][0]) for name in Unit._fields))
        try:
            record = self.engine.extract(unit)
            failure = record.failed[-1][1] if record.failed else None
            result: dict[str, Any] = {"rows": record.rows, "failed": len(record.failed), "failure": failure}
        except UserError as e:
            result = {"error": str(e)}
        except OSError as e:
            if e.errno not in WRITE_MENDS:
                raise
            result = {"error": f"out: {self.engine.task.out}: {WRITE_MENDS[e.errno]}"}
        return {"result": [json.dumps(result)]}
