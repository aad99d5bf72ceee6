"""``dmm demo`` as a user runs it, on less of everything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = """
documents: 150
samples: 20_000
batch: 256
evaluation: {max_rows: 1000, train_rows: 5000, mixture_sizes: [64], sae_samples: 20000, lm_documents: 5, nll_rows: 16,
             samples: 200, two_sample_rows: 100}
"""


def run(out: Path, *args: str) -> subprocess.CompletedProcess:
    config = out.parent / "demo.yaml"
    config.write_text(SMALL)
    command = [sys.executable, "-m", "dmm_ray", "demo", "--config", str(config), "--out", str(out), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_demo_leaves_a_report_and_refuses_another_one_there(tmp_path):
    out = tmp_path / "demo"
    done = run(out)
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
        "sae",
        "untrained",
    }
    other = run(out, "--seed", "5")
    assert other.returncode == 2
    assert len([line for line in other.stderr.splitlines() if line.startswith("dmm demo: ")]) == 1
