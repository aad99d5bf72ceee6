from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from dmm_ray.serving.deployments.batching import Columns, RowBatcher, Rows


class Doubler:
    """A solver that doubles, remembers its calls and can be held."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.thread = ""
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.waiting: list[int] = []

    def __call__(self, key: str, rows: Rows) -> Columns:
        x = rows["x"]
        self.calls.append((key, x.tolist()))
        self.thread = threading.current_thread().name
        self.started.set()
        assert self.go.wait(10)
        if key == "bad" and (x < 0).any():
            raise ValueError(f"negative: {x[x < 0].tolist()}")
        return {"y": 2 * x, "evaluations": 3, "percentile": None}


def run(
    body: Callable[[RowBatcher[str], Doubler], Coroutine[Any, Any, None]],
    max_rows: int = 4,
    wait_s: float = 0.0,
) -> Doubler:
    solver = Doubler()

    async def main() -> None:
        await asyncio.wait_for(
            body(RowBatcher(solver, lambda _: max_rows, wait_s, solver.waiting.append), solver), 20
        )

    asyncio.run(main())
    return solver


def rows(*values: int) -> Rows:
    return {"x": np.array(values)}


async def queued(
    batcher: RowBatcher[str], solver: Doubler, *requests: tuple[str, Rows]
) -> list[asyncio.Task[Columns]]:
    """Submit ``requests`` while the solver is busy with another, then let it go."""
    solver.go.clear()
    blocker = asyncio.create_task(batcher.submit("blocker", rows(0)))
    await asyncio.to_thread(solver.started.wait, 10)
    tasks = [asyncio.create_task(batcher.submit(key, r)) for key, r in requests]
    await asyncio.sleep(0)  # let the tasks queue
    solver.go.set()
    await blocker
    return tasks


def test_waiting_rows_of_one_key_share_a_call() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        tasks = await queued(batcher, solver, ("a", rows(1)), ("b", rows(9)), ("a", rows(2, 3)))
        answers = [(await task)["y"].tolist() for task in tasks]
        assert answers == [[2], [18], [4, 6]]

    assert run(body).calls[1:] == [("a", [1, 2, 3]), ("b", [9])]


def test_large_requests_are_cut_and_joined_and_others_get_a_turn() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        large, small = await queued(batcher, solver, ("a", rows(*range(10))), ("b", rows(7)))
        assert (await small)["y"].tolist() == [14]
        assert await large == {"y": pytest.approx(np.arange(10) * 2), "evaluations": 3, "percentile": None}

    assert run(body).calls[1:] == [("a", [0, 1, 2, 3]), ("b", [7]), ("a", [4, 5, 6, 7]), ("a", [8, 9])]


def test_rows_that_do_not_fit_keep_their_order() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        await asyncio.gather(
            *await queued(batcher, solver, ("a", rows(1, 2)), ("a", rows(3, 4, 5)), ("a", rows(6)))
        )

    assert run(body).calls[1:] == [("a", [1, 2]), ("a", [3, 4, 5, 6])]


def test_one_request_that_fails_does_not_fail_its_mates() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        tasks = await queued(batcher, solver, ("bad", rows(1)), ("bad", rows(-2)), ("bad", rows(3)))
        good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(bad, ValueError)
        assert str(bad) == "negative: [-2]"
        assert isinstance(good, dict)
        assert isinstance(other, dict)
        assert (await batcher.submit("bad", rows(5)))["y"].tolist() == [10]

    run(body)


def test_cancelled_requests_are_not_computed() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        solver.go.clear()
        blocker = asyncio.create_task(batcher.submit("blocker", rows(0)))
        await asyncio.to_thread(solver.started.wait, 10)
        task = asyncio.create_task(batcher.submit("a", rows(1, 2)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        solver.go.set()
        await blocker
        assert solver.waiting == [1, 0, 2, 0]  # also while the solver is at work
        assert (await batcher.submit("a", rows(2)))["y"].tolist() == [4]
        assert task.cancelled()

    assert run(body).calls == [("blocker", [0]), ("a", [2])]


def test_after_company_an_idle_batcher_waits_until_the_batch_is_full() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        await asyncio.gather(batcher.submit("a", rows(0)), batcher.submit("a", rows(1)))
        first = asyncio.create_task(batcher.submit("a", rows(2)))
        await asyncio.to_thread(lambda: None)  # the loop turns: the first would have been started by now
        await asyncio.gather(first, *(batcher.submit("a", rows(i)) for i in (3, 4, 5)))

    assert run(body, wait_s=60.0).calls == [("a", [0, 1]), ("a", [2, 3, 4, 5])]


def test_a_client_that_asks_alone_does_not_wait() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        for i in range(3):
            await batcher.submit("a", rows(i))

    assert run(body, wait_s=60.0).calls == [("a", [0]), ("a", [1]), ("a", [2])]


def test_all_is_computed_by_one_thread() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        await batcher.submit("a", rows(1))
        names = {await batcher.aside(lambda: threading.current_thread().name) for _ in range(3)}
        assert names == {solver.thread}

    run(body)


def test_the_event_loop_stays_free_while_the_solver_works() -> None:
    async def body(batcher: RowBatcher[str], solver: Doubler) -> None:
        solver.go.clear()
        task = asyncio.create_task(batcher.submit("a", rows(1)))
        await asyncio.to_thread(solver.started.wait, 10)
        assert not task.done()
        solver.go.set()
        await task

    run(body)
