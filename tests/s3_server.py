"""Local S3 servers, and this process pointed at them."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import fsspec
import pytest

BUCKET = "s3://bucket"
SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def settings(endpoint: str) -> dict[str, str]:
    """The environment in which ``s3://`` means ``endpoint``, with credentials that any server takes."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@cache
def port_to_be() -> int:
    """Where this test process's server will listen: Ray's workers are told when they start, which may be before."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def s3_at(endpoint: str) -> Iterator[None]:
    """``s3://`` means ``endpoint`` here and in processes started here."""
    s3 = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in settings(endpoint).items():
            patch.setenv(name, value)
        s3.clear_instance_cache()
        try:
            yield
        finally:
            s3.clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[str]:
    """The URI of the bucket of a server of its own process."""
    command = [sys.executable, "-c", SERVE, str(port_to_be())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with s3_at(f"http://127.0.0.1:{int(server.stdout.readline())}"):
                fsspec.filesystem("s3").mkdir(BUCKET)
                yield BUCKET
        finally:
            server.kill()


class Forbidding(http.server.BaseHTTPRequestHandler):
    """Answers that nothing is permitted."""

    def do_GET(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def forbidding_s3() -> Iterator[None]:
    """``s3://`` means a server that permits nothing."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            with s3_at(f"http://127.0.0.1:{server.server_port}"):
                yield
        finally:
            server.shutdown()
            thread.join()
