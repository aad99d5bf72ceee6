"""Scoring that is killed or interrupted: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from batch_cases import SCORE, files
from extractions import LIMIT_S, Run, units_of

RUN = "import json, sys; from dmm_ray.cli import VERBS, Verb, main;main(['score', *sys.argv[1:]])"


def start(options: dict[str, Any], out: Path, log: Path) -> Run:
    """The command as a process group of its own, on the Ray of the tests."""
    address = ray.get_runtime_context().gcs_address
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *flags, "--out", str(out)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, process_group=0,
            env={**os.environ, "RAY_ADDRESS": address},
        )  # fmt: skip
    return Run(process, log)


STOPS = ((signal.SIGKILL, 2, -signal.SIGKILL), (signal.SIGINT, 2, 130))[
    0 if os.environ.get("DMM_CHAOS_TRIALS") else 1 :
]
"""Signals, units before them and exit codes; the kill, which extraction's tests have too, is left to `make chaos`."""


@pytest.mark.fault
@pytest.mark.slow
def test_killed_then_interrupted_then_finished(options: dict[str, Any], scores: Path, tmp_path: Path) -> None:
    out, log, command = tmp_path / "scores", tmp_path / "log", {**options, **SCORE}
    for sent, more, code in STOPS:
        run, wanted = start(command, out, log), len(units_of(out)) + more
        run.until(lambda wanted=wanted: len(units_of(out)) >= wanted)  # type: ignore[misc]
        os.kill(run.process.pid, sent)
        assert run.end() == code, run.log
        assert not (out / "summary.json").exists()
    done = {unit: (out / "shards" / unit).stat().st_mtime_ns for unit in units_of(out)}
    run = start(command, out, log)
    stdout, _ = run.process.communicate(timeout=LIMIT_S)
    assert run.end() == 0, run.log
    assert stdout.splitlines()[-1] == str(out)
    assert {unit: (out / "shards" / unit).stat().st_mtime_ns for unit in done} == done
    assert files(out) == files(scores)
    assert json.loads((out / "summary.json").read_text())["figures"]["units"] > len(done)
