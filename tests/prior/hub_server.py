"""As much of the Hub's HTTP interface as publishing and fetching a prior takes, on this machine."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hub_http import HubHandler

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
        with _Handler.serving(self) as self.url:
            yield self


class _Handler(HubHandler):
    hub: PriorHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path):
            repo = self.hub.repos[match[1]]
            if match[2] == "branch":
                repo.branches.add(match[3])
                self.send_json({})
            elif match[3] not in repo.branches:
                self.refuse(404, "RevisionNotFound")
            else:
                getattr(self, f"_{match[2]}")(match[1], repo, body)

    def _validate(self, content: str) -> None:
        wrong = [{"message": '"license" must be one of a list'}] if "license: nonsense" in content else []
        self.send_json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private=asked.get("visibility") == "private"))
        self.send_json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _preupload(self, name: str, repo: Repo, body: bytes) -> None:
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.send_json({"files": files})

    def _commit(self, name: str, repo: Repo, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                repo.commits.append(line["value"]["summary"])
            else:
                repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self.send_json({"commitUrl": url, "commitOid": repo.commit, "success": True})

    def about(self, name: str, what: str, revision: str) -> None:
        if repo := self._repo(name):
            self.send_about(
                what, repo.commit, repo.files, id="any/name", private=repo.private, cardData=repo.card
            )

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if path not in repo.files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            repo.gets.append(path)
        self.send_file(repo.commit, repo.files[path])

    def _repo(self, name: str) -> Repo | None:
        if name not in self.hub.repos:
            self.refuse(404, "RepoNotFound")
        return self.hub.repos.get(name)
