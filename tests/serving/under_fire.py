"""What the tests under load share: questions with known answers, steady clients, the endpoint's processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from dmm_ray.client import Client
from dmm_ray.prior import ActivationPrior

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Question:
    """A call that a prior in this process and an endpoint answer alike."""

    operation: str
    n: int = 3
    seed: int = 0
    d: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)

    def ask(self, who: Client | ActivationPrior) -> np.ndarray:
        """The first column of the answer."""
        x = np.random.default_rng([self.n, self.seed]).normal(size=(self.n, self.d)).astype(np.float32)
        local = isinstance(who, ActivationPrior)
        subject: Any = self.n if self.operation == "sample" else torch.from_numpy(x) if local else x
        found = getattr(who, self.operation)(subject, seed=self.seed, **self.arguments)
        return np.asarray(found.nats if self.operation == "log_prob" else found)


class Known:
    """A question and its answers by the priors that may be asked.

    Args:
        question: the call.
        priors: in this process; the endpoint's answer must be that of one of them.
    """

    def __init__(self, question: Question, *priors: ActivationPrior) -> None:
        self.question = question
        self.answers = [question.ask(prior) for prior in priors]

    def check(self, client: Client) -> set[int]:
        """Ask the endpoint; the numbers of the priors that its rows are by. Raises AssertionError for a wrong row."""
        return self.which(self.question.ask(client))

    def which(self, found: np.ndarray) -> set[int]:
        """The numbers of the priors that the rows of ``found`` are by: parts of a request may be by either."""
        assert found.shape == self.answers[0].shape
        right = np.stack([_close(found, answer) for answer in self.answers])
        assert right.any(0).all(), (
            f"{self.question}: rows {np.flatnonzero(~right.any(0))} of {found} are wrong"
        )
        return set(right.argmax(0).tolist())


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isclose(a, b, rtol=1e-4, atol=1e-4).reshape(len(a), -1).all(1)


class Steady:
    """Results of work that is done over and over."""

    def __init__(self) -> None:
        self.results: list[object] = []
        self.enough = False
        self._changed = threading.Condition()

    def loop(self, work: Callable[[], object]) -> None:
        """Work until it is enough, or fails."""
        try:
            while not self.enough:
                self.results.append(work())
                with self._changed:
                    self._changed.notify_all()
        finally:
            self.enough = True
            with self._changed:
                self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        """Wait until ``more`` results have come, or a failure has. Raises AssertionError after two minutes."""
        wanted = len(self.results) + more
        with self._changed:
            came = self._changed.wait_for(lambda: self.enough or len(self.results) >= wanted, DEADLINE_S)
        assert came, f"{len(self.results)} of {wanted} results came"


@contextmanager
def steadily(work: Callable[[], object], threads: int = 1) -> Iterator[Steady]:
    """``work`` over and over in threads beside the block. Its first failure is raised at the end."""
    steady = Steady()
    with ThreadPoolExecutor(threads) as pool:
        loops = [pool.submit(steady.loop, work) for _ in range(threads)]
        try:
            yield steady
        finally:
            steady.enough = True
        for one in loops:
            one.result()


def processes(*titles: str) -> list[psutil.Process]:
    """This session's Ray processes whose title holds one of ``titles``, such as ``ServeReplica``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if title.startswith("ray::") and any(wanted in title for wanted in titles):
            found.append(process)
    return found


def resident() -> int:
    """Bytes of memory of the endpoint's processes: proxy, ingress, priors."""
    found = processes("ServeReplica", "ProxyActor")
    assert len(found) >= 3, found
    return sum(process.memory_info().rss for process in found)
