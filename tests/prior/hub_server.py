"""As much of the Hub's HTTP interface as publishing and fetching a prior takes, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"
"""The one token that may write."""


@dataclass
class Repo:
    """Files by path, all at one commit, whatever the branch."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    branches: set[str] = field(default_factory=lambda: {"main"})
    commits: list[str] = field(default_factory=list)
    """Messages."""
    card: dict[str, Any] | None = None
    """What the Hub has read from the model card."""
    gets: list[str] = field(default_factory=list)
    """Files sent."""

    @property
    def commit(self) -> str:
        return f"{len(self.commits) + 1:040x}"


@dataclass
class PriorHub:
    """Repositories by id."""

    repos: dict[str, Repo] = field(default_factory=dict)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[PriorHub]:
        """Serve on a free port inside the block."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: PriorHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._about(self._repo(match[1]), match[2] or "revision")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(self._repo(match[1]), match[3])
        else:
            self._refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path):
            repo = self.hub.repos[match[1]]
            if match[2] == "branch":
                repo.branches.add(match[3])
                self._json({})
            elif match[3] not in repo.branches:
                self._refuse(404, "RevisionNotFound")
            else:
                getattr(self, f"_{match[2]}")(match[1], repo, body)

    def _validate(self, content: str) -> None:
        wrong = [{"message": '"license" must be one of a list'}] if "license: nonsense" in content else []
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private=asked.get("visibility") == "private"))
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _preupload(self, name: str, repo: Repo, body: bytes) -> None:
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _commit(self, name: str, repo: Repo, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                repo.commits.append(line["value"]["summary"])
            else:
                repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self._json({"commitUrl": url, "commitOid": repo.commit, "success": True})

    def _repo(self, name: str) -> Repo | None:
        if name not in self.hub.repos:
            self._refuse(404, "RepoNotFound")
        return self.hub.repos.get(name)

    def _about(self, repo: Repo | None, what: str) -> None:
        if repo is None:
            return
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(repo.files.items())
        ]
        info = {
            "id": "any/name",
            "sha": repo.commit,
            "tags": [],
            "private": repo.private,
            "cardData": repo.card,
        }
        info["siblings"] = [{"rfilename": path} for path in sorted(repo.files)]
        self._json(files if what == "tree" else info)

    def _file(self, repo: Repo | None, path: str) -> None:
        if repo is None:
            return
        if path not in repo.files:
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            repo.gets.append(path)
        data = repo.files[path]
        tag = hashlib.sha256(data).hexdigest()
        self._send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
