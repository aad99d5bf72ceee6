"""How failures are reported to the user: one line with the cause, and the full traceback in a file.

Failures are sent between processes as text: not every exception can be pickled, or unpickled if its module is missing.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dmm_ray.errors import UserError
from dmm_ray.files import join, remove_folder, write_bytes

logger = logging.getLogger(__name__)
ERRORS = "errors"
"""Subfolder of an output folder for the traces of failures, removed when the work is done."""
LONGEST = 300
"""Maximum length of a message in the error line; the trace has the full message."""
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
"""Messages of torch and CUDA when out of memory; the exception types vary."""
PROCESS_GONE = {"WorkerCrashedError", "RayActorError", "NodeDiedError", "LocalRayletDiedError"}
"""Ray's exceptions for a process that exited or was killed."""
LAST_LINE = re.compile(r"^(?:[\w<>]+\.)*([A-Z]\w*): (.+)", re.MULTILINE)
"""The last line of a traceback: the exception's type and message."""


class Failure(NamedTuple):
    """An exception as text."""

    cause: str
    """One line."""
    trace: str

    @classmethod
    def of(cls, error: BaseException, memory_options: str = "") -> Failure:
        """The failure that ``error`` describes; arguments as for :func:`cause_of`."""
        if isinstance(error, WorkerError):
            return error.failure
        return cls(cause_of(error, memory_options), "".join(traceback.format_exception(error)))


class WorkerError(Exception):
    """A :class:`Failure` raised in one process and caught in another.

    Args:
        cause: one line.
        trace: traceback of the original exception.
    """

    def __init__(self, cause: str, trace: str) -> None:
        super().__init__(cause, trace)
        self.failure = Failure(cause, trace)

    def __str__(self) -> str:
        return self.failure.cause


def cause_of(error: BaseException, memory_options: str = "") -> str:
    """One line: the context of ``error`` (:func:`concerning`), its type, its message and, if memory ran out, a remedy.

    Args:
        error: an exception of this process, or one of Ray's for an exception in another process.
        memory_options: the options that reduce memory use.

    Example:
        >>> cause_of(KeyError("weight"))
        "KeyError: 'weight'"
        >>> cause_of(MemoryError(), "--batch-tokens")
        'MemoryError: out of memory; lower --batch-tokens or use a machine with more memory'
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    name, text = type(error).__name__, " ".join(str(error).split())
    remedy = f"lower {memory_options} or use " if memory_options else "use "
    if "RayError" in kinds:
        # Ray also reports an actor as dead if its constructor raised; the message then quotes the actual error.
        if (kinds & PROCESS_GONE and "creation task" not in text) or "OutOfMemoryError" in kinds:
            line = f"a worker process died ({name}), most likely killed because memory ran out; {remedy}"
            return f"{line}machines with more memory"
        line = last_error(str(error)) or f"{name}: {text[:LONGEST]}"
    elif isinstance(error, MemoryError) or NO_MEMORY.search(text):
        what = "a GPU" if "CUDA" in text else "a machine"
        line = f"{name}: {text[:LONGEST] or 'out of memory'}; {remedy}{what} with more memory"
    else:
        line = f"{name}: {text[:LONGEST]}" if text else name
    return ": ".join([*reversed(getattr(error, "__notes__", [])), line])


def last_error(text: str) -> str:
    """The last exception named in a text with tracebacks, in one line; empty if there is none.

    Example:
        >>> last_error("Traceback (most recent call last):\\n  File ...\\nmodule.BadError: no such layer\\n")
        'BadError: no such layer'
    """
    found = LAST_LINE.findall(text)
    # Ray's own exceptions, such as ActorDiedError, come after the original one, which they quote.
    own = [pair for pair in found if not pair[1].startswith("The actor")] or found
    return f"{own[-1][0]}: {own[-1][1].strip()[:LONGEST]}" if own else ""


@contextmanager
def concerning(what: str) -> Iterator[None]:
    """Mark exceptions raised in the block as concerning ``what``, e.g. "document 5", for :func:`cause_of`."""
    try:
        yield
    except Exception as e:
        e.add_note(what)
        raise


def keep_trace(name: str, trace: str, out: str | None = None) -> str:
    """Write a trace to a file, log it at level DEBUG, and return a message that tells the user where the file is.

    Args:
        name: name of the file, without its suffix.
        trace: its content.
        out: output folder, in whose ``errors/`` the file is written; if there is none or it is not writable, the file
            goes into the system's temporary folder.
    """
    logger.debug("%s", trace)
    data = trace.encode(errors="replace")
    if out is not None:
        path = join(out, ERRORS, f"{name}.log")
        try:
            write_bytes(path, data)
        except (UserError, OSError) as e:
            logger.warning("%s", e)
        else:
            return f"full trace: {path}"
    handle, path = tempfile.mkstemp(".log", f"dmm-{name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return f"full trace: {path}"


def remove_traces(out: str) -> None:
    """Delete the traces that :func:`keep_trace` wrote into the folder, once its work is done."""
    remove_folder(join(out, ERRORS))
