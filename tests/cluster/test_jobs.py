"""``ray job submit`` against a cluster started by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from dmm_ray import ActivationStore

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def start(env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    """A job, submitted; the command ends with it."""
    args = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", *command]
    return subprocess.Popen(
        args, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def log_of(job: subprocess.Popen[str], succeeds: bool = True) -> str:
    log, _ = job.communicate(timeout=280)
    assert (job.returncode == 0) is succeeds, log
    return log


@pytest.mark.slow
def test_a_job_that_extracts_and_one_that_fails(cluster, tiny_subject, tiny_text, tmp_path):
    store = tmp_path / "store"
    extracting = start(
        cluster, sys.executable, "jobs/extract.py", "--config", "jobs/configs/extract_demo.yaml",
        "--model", str(tiny_subject), "--text", str(tiny_text), "--layers", "[2]", "--out", str(store),
    )  # fmt: skip
    failing = start(
        cluster, sys.executable, "jobs/score.py", "--config", "jobs/configs/score_demo.yaml",
        "--prior", str(tmp_path), "--activations", str(store), "--out", str(tmp_path / "scores"),
    )  # fmt: skip
    assert str(store) in log_of(extracting)
    assert f"dmm score: {tmp_path}" in log_of(failing, succeeds=False)
    assert ActivationStore.open(str(store)).rows > 500
