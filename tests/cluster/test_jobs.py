"""``ray job submit`` of extraction and training against a cluster started by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmm_ray import ActivationPrior, ActivationStore

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
def test_extract_and_train_as_jobs(cluster, tiny_subject, tiny_text, tmp_path):
    store, prior = tmp_path / "store", tmp_path / "prior"
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
    training = [
        sys.executable, "jobs/train.py", "--config", "jobs/configs/train_demo.yaml", "--wandb", "disabled",
        "--activations", str(store), "--out", str(prior), "--samples", "4096", "--batch", "256",
        "--precision", "float32", "--workers", "0",  # workers on a cluster: test_train_elastic
    ]  # fmt: skip
    log_of(start(cluster, *training))
    trained = ActivationPrior.from_pretrained(str(prior))
    assert trained.d == 32
    assert trained.calibration is not None
    records = [json.loads(line) for line in (prior / "stats.jsonl").read_text().splitlines()]
    assert records[-1]["samples"] == 4096
