"""Two units at a time in one actor: after a failure nothing more is written."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch

from dmm_ray.errors import UserError
from dmm_ray.failures import concerning, last_error
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.unit import Unit, unit_at

FULL = "out: /there: the disk is full; free some space and run the same command again"


class Writer(UnitActor):
    """Unit 0 finds the disk full; unit 1 writes meanwhile, unit 2 wants to write after."""

    def __init__(self) -> None:
        super().__init__("/there")
        self.writing, self.go_on = threading.Event(), threading.Event()
        self.written: list[int] = []

    def work(self, unit: Unit) -> dict[str, Any]:
        """Write in a turn; unit 1's takes until it may go on."""
        if unit.unit == 0:
            self.writing.wait()
            raise OSError(errno.ENOSPC, "no space")
        with self.turn():
            if unit.unit == 1:
                self.writing.set()
                self.go_on.wait()
            self.written.append(unit.unit)
        return {"rows": 1}


def ask(actor: UnitActor, unit: int) -> dict[str, Any]:
    """The result of a unit."""
    batch = {name: np.array([value]) for name, value in unit_at(unit, 3, 1)._asdict().items()}
    [result] = actor(batch)["result"]
    return dict(json.loads(result))


def test_an_error_waits_for_what_is_being_written_and_is_the_last_word() -> None:
    actor = Writer()
    with ThreadPoolExecutor(2) as threads:
        written, failed = threads.submit(ask, actor, 1), threads.submit(ask, actor, 0)
        actor.writing.wait()
        assert not wait([failed], timeout=0.5).done
        actor.go_on.set()
        assert written.result() == {"rows": 1}
        assert failed.result() == {"error": FULL}
    assert ask(actor, 2) == {"error": FULL}
    assert actor.written == [1]


def test_bad_input_stops_an_actor_too() -> None:
    class Refuses(Writer):
        def work(self, unit: Unit) -> dict[str, Any]:
            if unit.unit == 0:
                raise UserError("text: not that")
            return super().work(unit)

    actor = Refuses()
    assert ask(actor, 0) == ask(actor, 2) == {"error": "text: not that"}
    assert actor.written == []


class Odd(Exception):
    """Cannot be pickled, nor made anew from its message."""

    def __init__(self, code: int, lock: object) -> None:
        super().__init__(f"code {code}\nand more")
        self.lock = lock


ODD = {
    "unpicklable": (Odd(3, threading.Lock()), "Odd: code 3 and more"),
    "no message": (AssertionError(), "AssertionError"),
    "key": (KeyError("weight"), "KeyError: 'weight'"),
    "input/output": (OSError(errno.EIO, "Bad disk", "/a"), "OSError: [Errno 5] Bad disk: '/a'"),
    "memory": (MemoryError(), "MemoryError: out of memory; lower --batch-rows or use a machine with more memory"),
    "CUDA": (
        torch.OutOfMemoryError("CUDA out of memory. Tried it"),
        "OutOfMemoryError: CUDA out of memory. Tried it; lower --batch-rows or use a GPU with more memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "cause"), ODD.values(), ids=ODD)
def test_whatever_a_unit_raises_comes_back_as_text(error: Exception, cause: str) -> None:
    class Raises(Writer):
        memory_options = "--batch-rows"

        def work(self, unit: Unit) -> dict[str, Any]:
            with concerning(f"document {unit.first}"):
                raise error

    actor = Raises()
    first = ask(actor, 1)
    assert {**first, "trace": ""} == {"error": f"document 1: {cause}", "unit": 1, "trace": ""}
    assert first["trace"].startswith("Traceback (most recent call last)")
    assert type(error).__name__ in first["trace"]
    assert ask(actor, 2) == first  # nothing more is done


def test_the_last_error_of_a_text_with_traces() -> None:
    """What Ray says of an actor whose constructor failed, and Serve of a replica."""
    text = 'Traceback ...\n  File "a.py", line 3\n    Model: x\npackage.module.BadError: no such layer\n\n'
    ray = f"{text}ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task\n"
    assert last_error(text) == last_error(ray) == "BadError: no such layer"
    assert last_error("Ctor.__init__.<locals>.Odd: constructor\n") == "Odd: constructor"
    assert last_error("all is well") == ""
