"""Text of ``hf://datasets/...``, read from a local server that answers as the hub does."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPO = "someone/texts"
READ = """
import json, sys
from dmm_ray.text.corpus import Corpus
from dmm_ray.errors import UserError
try:
    corpus = Corpus.scan(sys.argv[1:])
    json.dump([d.text for d in corpus.read()] + [d.text for d in corpus.read(2, 3)], sys.stdout)
except UserError as e:
    sys.exit(str(e))
"""


class Hub(ThreadingHTTPServer):
    """Serves a folder as the data set ``someone/texts`` with the one revision ``main``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def tree(self, folder: str, is_deep: bool) -> list[dict[str, object]]:
        """The entries of a folder, or all below it."""
        folders = {str(parent) for file in self.files for parent in Path(file).parents} - {"."}
        entries = [
            *(
                {"type": "file", "path": p, "size": len(data), "oid": "0" * 40}
                for p, data in self.files.items()
            ),
            *({"type": "directory", "path": p, "size": 0, "oid": "1" * 40} for p in folders),
        ]
        parent = Path(folder or ".")
        return [
            entry
            for entry in entries
            if parent == Path(str(entry["path"])).parent
            or (is_deep and parent in Path(str(entry["path"])).parents)
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        tree, data = f"/api/datasets/{REPO}/tree/main", f"/datasets/{REPO}/resolve/main/"
        if path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            self.answer(json.dumps({"id": REPO, "sha": "2" * 40, "siblings": []}).encode())
        elif path.startswith(tree):
            is_deep = "recursive=true" in self.path.lower()
            found = self.server.tree(path.removeprefix(tree).lstrip("/"), is_deep)
            self.answer(json.dumps(found).encode())
        elif path.startswith(data) and path.removeprefix(data) in self.server.files:
            self.answer(self.server.files[path.removeprefix(data)])
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send what the Range header asks for."""
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The address of a hub that holds parquet, compressed jsonl and files that are no text."""
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Texts")
    pq.write_table(pa.table({"id": [1, 2], "text": ["p1", "p2"]}), folder / "data" / "train-0.parquet")
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "j1"}\n{"text": "j2"}\n'))
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{hub.server_port}"
        hub.shutdown()
        thread.join()


def read(endpoint: str, home: Path, *uris: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", READ, *uris]
    return subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )


def test_a_data_set_of_the_hub(endpoint: str, tmp_path: Path) -> None:
    expected = ["p1", "p2", "j1", "j2", "j1"]
    for uri in (f"hf://datasets/{REPO}", f"hf://datasets/{REPO}@main/**"):
        done = read(endpoint, tmp_path / "home", uri)
        assert (done.stderr, done.returncode) == ("", 0)
        assert json.loads(done.stdout) == expected
    done = read(endpoint, tmp_path / "home", f"hf://datasets/{REPO}/data/train-0.parquet")
    assert json.loads(done.stdout) == ["p1", "p2"]


def test_what_the_hub_lacks(endpoint: str, tmp_path: Path) -> None:
    missing = {
        f"hf://datasets/{REPO}/data/gone.parquet": "no such file",
        "hf://datasets/someone/gone": "not found",
    }
    for uri, message in missing.items():
        done = read(endpoint, tmp_path / "home", uri)
        assert f"{uri}: " in done.stderr
        assert message in done.stderr
        assert (done.stderr.count("\n"), done.returncode) == (1, 1)
