"""``ray job submit`` of extraction, training and scoring against a cluster started by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmm_ray import ActivationPrior, ActivationStore

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def submit(env: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    args = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, *command]
    return subprocess.run(args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_extract_train_and_score_as_jobs(cluster, tiny_subject, tiny_text, tmp_path):
    store, prior = tmp_path / "store", tmp_path / "prior"
    done = submit(
        cluster, "jobs/extract.py", "--config", "jobs/configs/extract_demo.yaml",
        "--model", str(tiny_subject), "--text", str(tiny_text), "--layers", "[2]", "--out", str(store),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(store) in done.stdout
    assert ActivationStore.open(str(store)).rows > 500
    done = submit(
        cluster, "jobs/train.py", "--config", "jobs/configs/train_demo.yaml", "--wandb", "disabled",
        "--activations", str(store), "--out", str(prior), "--samples", "4096", "--batch", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    trained = ActivationPrior.from_pretrained(str(prior))
    assert trained.d == 32
    assert trained.calibration is not None
    records = [json.loads(line) for line in (prior / "stats.jsonl").read_text().splitlines()]
    assert records[-1]["samples"] == 4096
    done = submit(
        cluster, "jobs/score.py", "--config", "jobs/configs/score_demo.yaml", "--steps", "2", "--actors", "1",
        "--prior", str(prior), "--activations", str(store), "--out", str(tmp_path / "scores"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "scores" / "summary.json").read_text())["figures"]
    assert 0 < figures["rows"] < ActivationStore.open(str(store)).rows
    failed = submit(
        cluster, "jobs/train.py", "--activations", str(tmp_path / "none"), "--out", str(tmp_path / "x")
    )
    assert failed.returncode != 0
    assert "not an activation store" in failed.stdout + failed.stderr
