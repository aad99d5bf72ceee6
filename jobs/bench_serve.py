"""Benchmark of the endpoint against the same calls in process: rows per second at saturation, latency at low load, and
time per token of texts.

The computing process has one thread in both cases, which leaves the second core of a small machine for HTTP; the
client's share of the CPU time is reported.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import psutil
import torch
from timing import medians

from dmm_ray.client import Client
from dmm_ray.prior import ActivationPrior, PriorConfig

D = 64
LAYER = 2
CLIENTS = 8
CHUNK = 256
BATCH = 1024
SMALL = 32
TOKEN = "bench"
TEXT = "Tom and his dog went to the park. It was a sunny day and they were happy to play with the ball. "
OPERATIONS: tuple[tuple[str, int, dict], ...] = (
    ("log_prob", 4, {"probes": 2}),
    ("denoise", 2, {}),
    ("encode", 1, {"block": 0}),
)
"""Name, divisor of the number of rows, arguments."""
Say = Callable[[str], None]
Calls = dict[str, Callable[[], object]]


def small_prior() -> ActivationPrior:
    """An untrained prior of the demo's size, which costs the same as a trained one."""
    config = PriorConfig(d=D, layers=(LAYER,), d_model=256, d_mlp=512, n_blocks=6, variance_floor=1e-6)
    prior = ActivationPrior.untrained(config, torch.zeros(D), torch.ones(D))
    return prior.to("cuda" if torch.cuda.is_available() else "cpu")


class Cpu:
    """CPU seconds of this process and of all its descendants, including Ray's."""

    def __init__(self) -> None:
        self.own = self.others = 0.0

    def counted(self, call: Callable[[], object]) -> Callable[[], object]:
        """Wrap ``call`` so that its CPU time is added to this object."""

        def run() -> object:
            before = self._now()
            result = call()
            own, others = (b - a for a, b in zip(before, self._now(), strict=True))
            self.own, self.others = self.own + own, self.others + others
            return result

        return run

    @property
    def share(self) -> float:
        """This process's share of the total."""
        return self.own / (self.own + self.others)

    def _now(self) -> tuple[float, float]:
        me = psutil.Process()
        return _seconds(me), sum(map(_seconds, me.children(recursive=True)))


def bench(say: Say, rows: int = 8192, rounds: int = 3, tokens: int = 64) -> None:
    """Run all parts behind each of the two proxies.

    Args:
        say: receives each line of results.
        rows: rows of a saturated call of the cheapest operation; the others get fewer.
        rounds: rounds that medians are taken over; six times as many for latencies.
        tokens: tokens to generate.
    """
    prior = small_prior()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for proxy in ("serve", "haproxy"):
        say(f"serve --proxy {proxy}")
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            prior.save_pretrained(folder)
            url = stack.enter_context(endpoint(folder, proxy))
            client = stack.enter_context(Client(url, token=TOKEN, chunk_rows=CHUNK, in_flight=CLIENTS))
            headers = {"Authorization": f"Bearer {TOKEN}"}
            http = stack.enter_context(httpx.Client(base_url=url, timeout=300, headers=headers))
            saturation(say, prior, client, http, rows, rounds)
            latency(say, prior, client, http, rounds * 6)
            texts(say, client, tokens, rounds)
    torch.set_num_threads(threads)


@contextmanager
def endpoint(prior: str, proxy: str) -> Iterator[str]:
    """Run `dmm serve` in a separate process with the demo's language model; yields its URL once it is ready."""
    subject = str(importlib.resources.files("dmm_ray.demo") / "subject")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-c",
        "from dmm_ray.cli import main; main()",
        "serve",
        "--prior",
        prior,
        "--port",
        port,
    ]
    command += ["--model", subject, "--proxy", proxy, "--max-batch-rows", str(BATCH)]
    command += ["--gpus", "0.5", "--subject-gpus", "0.5"] if torch.cuda.is_available() else []
    environment = {**os.environ, "DMM_SERVE_TOKENS": TOKEN}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr
        if not any("ready: " in line for line in process.stderr):
            raise RuntimeError(f"`dmm serve --proxy {proxy}` did not start; run it manually to see why")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would block it
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def saturation(
    say: Say, prior: ActivationPrior, client: Client, http: httpx.Client, rows: int, rounds: int
) -> None:
    """Rows per second of each operation: in process, binary, JSON."""
    for name, part, arguments in OPERATIONS:
        x = torch.randn(rows // part, D)
        cpu = {"binary": Cpu(), "JSON": Cpu()}

        def in_process(x: torch.Tensor = x, name: str = name, arguments: dict = arguments) -> None:
            for start, batch in enumerate(x.split(BATCH)):
                ids = np.arange(start * BATCH, start * BATCH + len(batch))
                getattr(prior, name)(batch, ids=ids, **arguments)

        def binary(x: torch.Tensor = x, name: str = name, arguments: dict = arguments) -> None:
            getattr(client, name)(x.numpy(), **arguments)

        def in_json(x: torch.Tensor = x, name: str = name, arguments: dict = arguments) -> None:
            _json_rows(http, name, x, arguments)

        calls: Calls = {"in process": in_process, "binary": cpu["binary"].counted(binary)}
        calls["JSON"] = cpu["JSON"].counted(in_json)
        taken = medians(calls, rounds)
        for how, seconds in taken.items():
            more = f", {taken['in process'] / seconds:4.0%} of in process" if how in cpu else ""
            more += f", the client has {cpu[how].share:.0%} of the CPU time" if how in cpu else ""
            say(f"serve {name:8} saturated, {how:10} {len(x) / seconds:10,.0f} rows/s{more}")


def latency(say: Say, prior: ActivationPrior, client: Client, http: httpx.Client, rounds: int) -> None:
    """Median time of one small request at a time, and the overhead of HTTP."""
    for n in (1, SMALL):
        x = torch.randn(n, D)

        def in_process(x: torch.Tensor = x) -> None:
            prior.log_prob(x)

        def binary(x: torch.Tensor = x) -> None:
            client.log_prob(x.numpy())

        def in_json(x: torch.Tensor = x) -> None:
            _json_rows(http, "log_prob", x, {})

        taken = medians({"in process": in_process, "binary": binary, "JSON": in_json}, rounds)
        for how, seconds in taken.items():
            added = 1e3 * (seconds - taken["in process"])
            say(f"serve log_prob of {n:2} rows, {how:10} p50 {1e3 * seconds:8.1f} ms, {added:+6.1f} ms")


def texts(say: Say, client: Client, tokens: int, rounds: int) -> None:
    """Milliseconds per token of scoring a text, and of generating one plain, steered, and projected."""
    text = TEXT * 8
    along = list(range(D))
    calls: Calls = {
        "score_text": lambda: client.score_text(text),
        "generate": lambda: client.generate(TEXT, project=False, max_tokens=tokens),
        "generate, steered": lambda: client.generate(
            TEXT, along, layer=LAYER, project=False, max_tokens=tokens
        ),
        "generate, projected": lambda: client.generate(TEXT, along, layer=LAYER, max_tokens=tokens),
    }
    counts = {name: len(call().tokens) for name, call in calls.items()}  # type: ignore[attr-defined]
    for name, seconds in medians(calls, rounds).items():
        say(f"serve {name:20} {1e3 * seconds / counts[name]:8.2f} ms/token over {counts[name]} tokens")


def _json_rows(http: httpx.Client, operation: str, x: torch.Tensor, arguments: dict) -> None:
    """Send the rows through the JSON route, with the client's chunk size and concurrency."""

    def post(start: int) -> None:
        ids = list(range(start, min(start + CHUNK, len(x))))
        body = {"activations": x[start : start + CHUNK].tolist(), "ids": ids, **arguments}
        answer = http.post(f"/v1/{operation}", content=json.dumps(body))
        answer.raise_for_status()
        answer.json()

    starts = range(0, len(x), CHUNK)
    if len(starts) == 1:
        post(0)
        return
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(post, starts))


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system
