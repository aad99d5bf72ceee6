"""``dmm extract`` as processes of their own, to be disturbed, and what they leave on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from texts import make_texts

POLL_S = 0.002
LIMIT_S = 120.0
ALONE = (str(Path(__file__).with_name("alone.py")),)
"""In place of ``-m dmm_ray``: without Ray."""
BY_LINE = "DMM_TEST_BY_LINE"
"""In the environment of such a command: it waits for a line before each unit."""


@dataclass
class Run:
    """A command under way. Its log goes to a file: a pipe would stay open as long as any child lives."""

    process: subprocess.Popen[str]
    log_file: Path

    @property
    def log(self) -> str:
        """All of stderr so far."""
        return self.log_file.read_text()

    def end(self) -> int:
        """Wait for its exit code."""
        return self.process.wait(LIMIT_S)

    def finish(self) -> str:
        """Wait for an end without error; its log."""
        assert self.end() == 0, self.log
        return self.log

    def go_on(self, units: int) -> None:
        """Let so many more units begin, where the job waits before each (``BY_LINE``)."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n" * units)
        self.process.stdin.flush()

    def until(self, condition: Callable[[], bool]) -> None:
        """Watch until ``condition`` holds, while the command is running."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(POLL_S)

    def children(self) -> list[psutil.Process]:
        """Its Ray: every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)


@dataclass(frozen=True)
class Job:
    """An extraction that can be started again and again."""

    model: Path
    text: Path
    logs: Path
    options: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ("-m", "dmm_ray")

    def start(self, out: Path, **more: object) -> Run:
        """Start the command, in a process group of its own as a terminal does."""
        options = {"model": self.model, "text": self.text, "out": out, **self.options, **more}
        flags = [
            part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        log_file = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *self.command, "extract", *flags],
                stdin=subprocess.PIPE if BY_LINE in self.env else subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=log, text=True, env={**os.environ, **self.env}, process_group=0,
            )  # fmt: skip
        return Run(process, log_file)


def extraction_actors(process: psutil.Process) -> list[psutil.Process]:
    """Those among the processes below one that are at work."""
    return [child for child in process.children(recursive=True) if "MapWorker" in child.name()]


def write_text(path: Path, documents: int) -> Path:
    """A jsonl file of so many short documents."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(documents)))
    return path


def units_of(store: Path) -> set[str]:
    """Names of the records of finished units."""
    return {path.name for path in store.glob("shards/*.json")}


def content(store: Path) -> dict[str, bytes]:
    """Every file that must not depend on what the job went through."""
    found = [*store.glob("*/*"), store / "statistics.safetensors"]
    return {str(path.relative_to(store)): path.read_bytes() for path in found}


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """When each file of the finished units was written, and its inode."""
    names = [
        name
        for unit in units_of(store)
        for name in json.loads((store / "shards" / unit).read_text())["files"]
    ]
    names += [f"shards/{unit}" for unit in units_of(store)]
    return {name: ((store / name).stat().st_mtime_ns, (store / name).stat().st_ino) for name in names}


def left_over(store: Path) -> list[str]:
    """Temporary files and the lock."""
    return [path.name for path in store.rglob("*") if ".tmp-" in path.name or path.name == ".lock"]
