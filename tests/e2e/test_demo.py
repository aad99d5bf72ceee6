"""``make demo`` as a user runs it, on less of everything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmm_ray.cli import parse
from dmm_ray.demo.run import demo
from dmm_ray.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = "jobs/configs/demo_short.yaml"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_demo_leaves_a_report_and_refuses_another_one_there(tmp_path):
    out, venv = tmp_path / "demo", sys.prefix
    done = run(
        "make", "demo", f"OUT={out}", f"ARGS=--config {SHORT}", f"VENV={venv}",
        "-o", f"{venv}/.runtime",  # what is installed is used
        "--no-print-directory",  # `make test` calls this
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1])
    assert report.is_file()
    page = report.read_text()
    assert "Text scored through the endpoint" in page
    assert len(re.findall(r'title="-?\d+\.\d+ nats/dim', page)) > 20
    assert not re.search(r'(src|href)="https?:', page)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["fidelity"]["flow_matching_loss"]) >= {
        "prior",
        "gaussian",
        "pca",
        "mixture",
        "factor_analysers",
        "sae",
        "untrained",
    }
    _, other = parse("demo", ["--config", str(ROOT / SHORT), "--out", str(out), "--seed", "5"])
    with pytest.raises(UserError, match="choose another --out"):
        demo(other)
