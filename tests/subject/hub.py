"""As much of the hub's HTTP interface as fetching a model takes, on this machine, with real models behind it."""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._about(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _about(self, model: str, what: str, revision: str) -> None:
        if not self._there(model, revision):
            return
        if what == "revision":
            self.hub.revisions.put(revision)
        files = [_entry(file) for file in sorted(self.hub.models[model].iterdir())]
        siblings = [{"rfilename": file["path"]} for file in files]
        info = {
            "id": model,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        self._send(
            json.dumps(files if what == "tree" else info).encode(), {"Content-Type": "application/json"}
        )

    def _file(self, model: str, revision: str, name: str) -> None:
        if not self._there(model, revision):
            return
        if model in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        file = self.hub.models[model] / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.gets[name] += 1
            if name in self.hub.hold:
                self.hub.asked.set()
                self.hub.released.wait(60)
        data = file.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        self._send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _there(self, model: str, revision: str) -> bool:
        if model not in self.hub.models:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _entry(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
