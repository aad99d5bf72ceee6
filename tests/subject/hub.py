"""As much of the hub's HTTP interface as fetching a model takes, on this machine, with real models behind it."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hub_http import HubHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models by name; every one has the branches "main" and "v1", both at COMMIT."""

    models: dict[str, Path]
    gated: frozenset[str] = frozenset()
    """Models whose files need accepted terms."""
    hold: frozenset[str] = frozenset()
    """Names of files that are sent only once ``released`` is set."""
    released: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    """Set once a file in ``hold`` is asked for."""
    revisions: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    """Revisions of models that were asked for, in order."""
    gets: Counter[str] = field(default_factory=Counter)
    """Downloads of each file's content."""
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve on a free port inside the block."""
        with _Handler.serving(self) as self.url:
            try:
                yield self
            finally:
                self.released.set()


class _Handler(HubHandler):
    hub: Hub

    def about(self, name: str, what: str, revision: str) -> None:
        if not self._there(name, revision):
            return
        if what == "revision":
            self.hub.revisions.put(revision)
        files = {file.name: file.read_bytes() for file in self.hub.models[name].iterdir()}
        self.send_about(what, COMMIT, files, id=name, private=False, downloads=0)

    def file(self, name: str, revision: str, path: str) -> None:
        if not self._there(name, revision):
            return
        if name in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        file = self.hub.models[name] / path
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.gets[path] += 1
            if path in self.hub.hold:
                self.hub.asked.set()
                self.hub.released.wait(60)
        self.send_file(COMMIT, file.read_bytes())

    def _there(self, name: str, revision: str) -> bool:
        if name not in self.hub.models:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False
