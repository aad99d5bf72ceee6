"""A resumable run over units on a Ray Data actor pool, including preparing and completing its folder."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from typing import Any, Generic, TypeVar

from dmm_ray.config import Config
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.failures import keep_trace, remove_traces
from dmm_ray.files import make_folder
from dmm_ray.provenance import SUMMARY, write_summary
from dmm_ray.ray_session import ensure_ray
from dmm_ray.store.manifest import Manifest
from dmm_ray.store.reader import file_sizes
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.lock import WriterLock, writer_lock
from dmm_ray.units.pool import map_units
from dmm_ray.units.progress import Progress
from dmm_ray.units.resources import ActorPool, Resources, plan_resources
from dmm_ray.units.resume import Done, prepare, remove_temporary
from dmm_ray.units.unit import Unit, unit_at

logger = logging.getLogger(__name__)
C = TypeVar("C", bound=Config)


class Job(ABC, Generic[C]):
    """The work that a command does on units.

    Args:
        out: folder to write or resume; an absolute path or URI.
        manifest: describes the contents of the folder.
        pool: the processes that do the work.
        config: the command's configuration, for ``summary.json``.
    """

    def __init__(self, out: str, manifest: Manifest, pool: ActorPool, config: C) -> None:
        self.out, self.manifest, self.pool, self.config = out, manifest, pool, config
        self.failed = 0
        """Number of documents that failed so far, including those in units from earlier runs."""

    @abstractmethod
    def actor(self, resources: Resources, units: int) -> tuple[type[UnitActor], tuple[Any, ...]]:
        """The actor class and its arguments; logs a description of the ``units`` units to be done."""

    def add(self, result: dict[str, Any]) -> None:
        """Add a unit's result to the totals. An override may raise UserError to end the run."""
        self.failed += result.get("failed", 0)

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Called after the last unit: write data about the whole run and return the summary's ``figures``."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Additional keys for the summary."""
        return {}


def run_job(job: Job[Any], started: float) -> str:
    """Write or resume the folder ``job.out`` and return it.

    Args:
        job: the work to do.
        started: ``time.monotonic()`` at the start of the command, for the summary's ``seconds``.

    Raises:
        UserError: the folder contains something else or results of a different configuration, or is being written by
            another process; or a unit reports bad input.
        CheckFailed: another process took over the folder; or a unit or the actor pool failed for a reason other than
            the input. The traceback is in the file named by the message until the folder is complete.
    """
    out, manifest = job.out, job.manifest
    make_folder(out)
    with writer_lock(out) as lock:
        done = prepare(out, manifest)
        if len(done.units) == manifest.units and SUMMARY in file_sizes(out):
            logger.info("%s is complete already: %d units", out, manifest.units)
            return out
        if done.units:
            logger.info("resuming %s: %d of %d units are done", out, len(done.units), manifest.units)
        job.failed = done.failed
        try:
            rows_per_s = _run_units(job, done, lock)
        finally:
            remove_temporary(out)
        figures = {**job.finish(), "rows_per_s": rows_per_s and round(rows_per_s, 1)}
        inputs = job.config.model_dump(mode="json")
        remove_traces(out)
        write_summary(out, {"figures": figures, **job.provenance}, inputs, time.monotonic() - started)
    return out


def _run_units(job: Job[Any], done: Done, lock: WriterLock) -> float | None:
    """Process the units not yet ``done``, logging progress; returns rows per second, None if there were no units."""
    manifest = job.manifest
    todo = [
        unit_at(unit, manifest.documents, manifest.documents_per_unit)
        for unit in range(manifest.units)
        if unit not in done.units
    ]
    if not todo:
        return None
    progress = Progress(len(todo))
    with closing(work(job, todo)) as results:
        for result in results:
            lock.check()
            if "error" in result:
                raise _failure(job.out, manifest, result)
            job.add(result)
            progress.add(result["rows"])
    return progress.rows_per_s


def _failure(out: str, manifest: Manifest, result: dict[str, Any]) -> Exception:
    """The exception to raise for a result with an error."""
    if "trace" not in result:
        return UserError(result["error"])
    if "unit" not in result:
        return CheckFailed(f"{result['error']}; {keep_trace('actors', result['trace'], out)}")
    unit = unit_at(result["unit"], manifest.documents, manifest.documents_per_unit)
    last = unit.stop - 1
    documents = f"document {last}" if unit.first == last else f"documents {unit.first} to {last}"
    where = keep_trace(f"unit-{unit.unit:06d}", result["trace"], out)
    cause = result["error"]
    which = f", {cause}" if cause.startswith("document ") else f" ({documents}): {cause}"
    return CheckFailed(f"unit {unit.unit}{which}; {where}")


def work(job: Job[Any], units: list[Unit]) -> Generator[dict[str, Any]]:
    """Yield the results of units as they finish, from a pool of the job's actors on Ray."""
    ensure_ray()
    resources = plan_resources(job.pool, len(units))
    actor, arguments = job.actor(resources, len(units))
    yield from map_units(actor, arguments, units, resources)
