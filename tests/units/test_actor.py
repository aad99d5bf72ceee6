"""Two units at a time in one actor: after a failure nothing more is written."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from dmm_ray.errors import UserError
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
    """Cannot be pickled, and its message has several lines."""

    def __init__(self) -> None:
        super().__init__("line one\n  line two")
        self.lock = threading.Lock()


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is called."""


def test_what_nobody_foresaw_is_one_line_that_names_the_unit() -> None:
    class Fails(Writer):
        LESS = "--batch-rows"

        def work(self, unit: Unit) -> dict[str, Any]:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate") if unit.unit else Odd()

    found = ask(Fails(), 0)
    assert found["error"] == "unit 0 (documents 0 to 0): Odd: line one line two"
    assert "raise OutOfMemoryError" in found["trace"]
    found = ask(Fails(), 2)
    assert found["error"].startswith(
        "unit 2 (documents 2 to 2): out of GPU memory; give a smaller --batch-rows"
    )
