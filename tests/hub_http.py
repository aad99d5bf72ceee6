"""What servers that speak the hub's HTTP interface share."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubHandler(BaseHTTPRequestHandler, ABC):
    """Finds what a GET means; ``hub`` is what it is about."""

    hub: Any
    protocol_version = "HTTP/1.1"

    @classmethod
    @contextmanager
    def serving(cls, hub: Any) -> Iterator[str]:
        """The URL of a server on a free port, inside the block."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (cls,), {"hub": hub}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.about(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[2], match[3])
        else:
            self.refuse(404, "EntryNotFound")

    @abstractmethod
    def about(self, name: str, what: str, revision: str) -> None:
        """Answer with a repository's description, or its files where ``what`` is "tree"."""

    @abstractmethod
    def file(self, name: str, revision: str, path: str) -> None:
        """Answer with a file."""

    def send_about(self, what: str, commit: str, files: dict[str, bytes], **info: object) -> None:
        """A description of ``files``, or their list."""
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(files.items())
        ]
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.send_json(
            listed if what == "tree" else {"sha": commit, "siblings": siblings, "tags": [], **info}
        )

    def send_file(self, commit: str, data: bytes) -> None:
        """A file's content, or what a HEAD says of it."""
        tag = hashlib.sha256(data).hexdigest()
        self.send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
