"""``serve deploy`` of a checked file (``serve/app.py``) against a cluster started by hand, then of other weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from serving.conftest import D, save_prior

from dmm_ray import ActivationPrior
from dmm_ray.client import Client
from dmm_ray.serving.serve import wait_ready

ROOT = Path(__file__).parents[2]
SERVE = str(Path(sys.executable).with_name("serve"))
X = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)


def run(env: dict[str, str], *command: str) -> None:
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def nats(prior: str) -> np.ndarray:
    return ActivationPrior.from_pretrained(prior).log_prob(X, steps=2, probes=2).nats.numpy()


@pytest.mark.slow
def test_deploy_then_other_weights(cluster: dict[str, str], free_port: int, tmp_path: Path) -> None:
    first, second = save_prior(tmp_path / "first"), save_prior(tmp_path / "second", seed=5)
    (tmp_path / "tokens").write_text("word\n")
    env = cluster | {"RAY_DASHBOARD_ADDRESS": cluster["RAY_ADDRESS"]}
    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    content["http_options"]["port"] = free_port
    (app,) = content["applications"]
    app["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    del app["args"]["auth"]
    app["args"] |= {
        "prior": [first],
        "token_file": str(tmp_path / "tokens"),
        "cpus": 0.5,
        "max_replicas": 1,
        "precision": "float32",
    }
    file = tmp_path / "config.yaml"

    def deploy() -> None:
        file.write_text(yaml.safe_dump(content))
        run(env, sys.executable, "-m", "dmm_ray.serving.deploy", str(file))
        run(env, SERVE, "deploy", str(file))

    try:
        deploy()
        wait_ready(f"http://127.0.0.1:{free_port}")
        with Client(f"http://127.0.0.1:{free_port}", token="word") as client:
            assert np.allclose(client.log_prob(X, steps=2, probes=2).nats, nats(first), atol=1e-3)
            app["args"]["prior"] = [second]
            deploy()
            old, new = nats(first), nats(second)
            while not np.allclose(found := client.log_prob(X, steps=2, probes=2).nats, new, atol=1e-3):
                assert np.allclose(found, old, atol=1e-3)
    finally:
        run(env, SERVE, "shutdown", "-y")
