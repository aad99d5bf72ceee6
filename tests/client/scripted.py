"""A real HTTP server that answers by a script, one entry a request, and keeps what it was asked."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """One answer; a status of 0 drops the connection, a body cut short does so after it."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass
class Script:
    """The answers to give, the last one for ever, and what came."""

    answers: Sequence[Answer]
    release: threading.Event = field(default_factory=threading.Event)
    """Answers with a header ``hold`` wait for it."""
    seen: list[tuple[str, Message, float]] = field(default_factory=list)
    url: str = ""

    def next(self, path: str, headers: Message) -> Answer:
        """The answer to the request that has come."""
        self.seen.append((path, headers, time.monotonic()))
        return self.answers[min(len(self.seen), len(self.answers)) - 1]


@contextmanager
def serving(*answers: Answer) -> Iterator[Script]:
    """A server on a free port of this machine; ``Script.url`` is its address."""
    script = Script(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = script.next(self.path, self.headers)
            if "hold" in answer.headers:
                script.release.wait(30)
            self.close_connection = True
            if not answer.status:
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body) + answer.cut))
            self.send_header("connection", "close")
            with contextlib.suppress(OSError):  # the client may have gone
                self.end_headers()
                self.wfile.write(answer.body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        script.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
