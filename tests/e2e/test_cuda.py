"""The whole way on a GPU, through Ray, against the same on the CPU; skipped where there is no GPU."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmm_ray.client import Client
from dmm_ray.prior import ActivationPrior, PriorConfig
from dmm_ray.store.reader import ActivationStore
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
LAYER = 2


def dmm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own; fails with its log."""
    command = [sys.executable, "-m", "dmm_ray", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def untrained() -> dict[str, ActivationPrior]:
    """The same weights on both devices."""
    config = PriorConfig(d=64, layers=(LAYER,), d_model=128, d_mlp=256, n_blocks=3, variance_floor=1e-6)
    mean, var = torch.full((1, 64), 0.5), torch.full((1, 64), 4.0)
    return {
        device: ActivationPrior.untrained(config, mean, var, seed=3).to(device) for device in ("cpu", "cuda")
    }


OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "log_prob": ("log_prob", {"steps": 8}),
    "log_prob, exact": ("log_prob", {"steps": 4, "probes": 0}),
    "denoise": ("denoise", {"u": 0.5, "steps": 8}),
    "denoise, mean": ("denoise", {"u": 0.5, "mode": "mean"}),
    "encode": ("encode", {"u": 0.1, "block": 1}),
    "velocity error": ("velocity_error", {"pairs": 4}),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_operations_give_what_the_cpu_gives(untrained, name, precision):
    operation, arguments = OPERATIONS[name]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 2 + 0.5
    found = {
        device: getattr(prior, operation)(x.to(device), precision=precision, **arguments)
        for device, prior in untrained.items()
    }
    if operation == "log_prob":
        found = {device: each.nats_per_dim for device, each in found.items()}
    assert found["cuda"].device.type == "cuda"
    tolerance = 2e-4 if precision == "float32" else 5e-2
    torch.testing.assert_close(
        found["cuda"].cpu().float(), found["cpu"].float(), rtol=tolerance, atol=tolerance
    )


def test_noise_and_samples_are_those_of_the_cpu(untrained):
    drawn = {
        device: prior.sample(16, steps=4, seed=-3, precision="float32") for device, prior in untrained.items()
    }
    torch.testing.assert_close(drawn["cuda"].cpu(), drawn["cpu"], rtol=2e-4, atol=2e-4)


def test_a_row_does_not_depend_on_its_batch_mates(untrained):
    prior, x = untrained["cuda"], torch.randn(300, 64)
    ids = torch.arange(300)
    whole = prior.log_prob(x, steps=4, ids=ids, precision="float32").nats
    part = prior.log_prob(x[100:107], steps=4, ids=ids[100:107], precision="float32").nats
    torch.testing.assert_close(part, whole[100:107], rtol=1e-4, atol=1e-3)


def test_compiled_operations_give_the_same(untrained):
    config = untrained["cuda"].config
    prior = ActivationPrior.untrained(
        config, torch.full((1, 64), 0.5), torch.full((1, 64), 4.0), seed=3
    ).cuda()
    x = torch.randn(64, 64)
    plain = prior.denoise(x, steps=4, precision="float32")
    prior.compile(mode="reduce-overhead")
    for _ in range(3):  # CUDA graphs are recorded at the second call and replayed at the third
        torch.testing.assert_close(
            prior.denoise(x, steps=4, precision="float32"), plain, rtol=1e-3, atol=1e-3
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_subject: Path, tiny_text: Path) -> Path:
    """Extracted on the GPU in float32."""
    out = tmp_path_factory.mktemp("cuda") / "store"
    dmm(
        "extract", "--model", tiny_subject, "--text", tiny_text, "--layers", f"[{LAYER}]", "--dtype", "float32",
        "--out", out,
    )  # fmt: skip
    return out


def _rows(store: Path | str) -> np.ndarray:
    opened = ActivationStore.open(str(store))
    groups = [opened.read(LAYER, group) for group in opened.row_groups(LAYER)]
    order = np.lexsort(
        (np.concatenate([g.position for g in groups]), np.concatenate([g.doc for g in groups]))
    )
    return np.concatenate([g.activation.float().numpy() for g in groups])[order]


def test_extraction_gives_the_rows_of_the_cpu(store, tiny_subject, tiny_text, tmp_path):
    other = tmp_path / "cpu"
    dmm(
        "extract", "--model", tiny_subject, "--text", tiny_text, "--layers", f"[{LAYER}]", "--dtype", "float32",
        "--gpus-per-actor", 0, "--out", other,
    )  # fmt: skip
    on_gpu, on_cpu = _rows(store), _rows(other)
    assert on_gpu.shape == on_cpu.shape
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
    dmm("verify", store)


def test_extraction_chooses_bfloat16(tiny_subject, tiny_text, tmp_path):
    out = tmp_path / "store"
    dmm(
        "extract", "--model", tiny_subject, "--text", tiny_text, "--layers", f"[{LAYER}]", "--gpus-per-actor", 0.5,
        "--actors", 2, "--out", out,
    )  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["compute_dtype"] == "bfloat16"
    dmm("verify", out)


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Trained by a Ray worker on the GPU, whose step is compiled."""
    out = tmp_path_factory.mktemp("cuda") / "prior"
    dmm(
        "train", "--activations", store, "--out", out, "--samples", 32_000, "--batch", 256, "--d-model", 64,
        "--d-mlp", 128, "--n-blocks", 2, "--precision", "float32", "--wandb", "disabled",
    )  # fmt: skip
    return out


def test_training_follows_the_curve_of_the_cpu(prior, store, tmp_path):
    config = TrainConfig(
        activations=str(store), out=str(tmp_path / "prior"), samples=32_000, batch=256, d_model=64, d_mlp=128,
        n_blocks=2, precision="float32", workers=0, device="cpu", wandb="disabled",
    )  # fmt: skip
    train(config)
    curves = [
        [json.loads(line)["loss"] for line in (folder / "stats.jsonl").read_text().splitlines()]
        for folder in (prior, tmp_path / "prior")
    ]
    np.testing.assert_allclose(*curves, rtol=2e-2)
    assert json.loads((prior / "stats.jsonl").read_text().splitlines()[-1])["memory_gb"] > 0


def test_training_in_bfloat16_in_this_process(store, tmp_path):
    config = TrainConfig(
        activations=str(store), out=str(tmp_path / "prior"), minutes=0.05, batch=256, d_model=64, d_mlp=128,
        n_blocks=2, workers=0, compile=False, wandb="disabled",
    )  # fmt: skip
    train(config)
    assert json.loads((tmp_path / "prior" / "train.json").read_text())["train"]["precision"] == "bfloat16"
    assert ActivationPrior.from_pretrained(str(tmp_path / "prior"), device="cuda").sample(4).isfinite().all()


def test_scores_of_a_store(prior, store, tmp_path):
    import pyarrow.parquet as pq

    out = tmp_path / "scores"
    dmm(
        "score",
        "--prior",
        prior,
        "--activations",
        store,
        "--steps",
        4,
        "--precision",
        "float32",
        "--out",
        out,
    )
    table = pq.read_table(sorted(out.rglob("*.parquet"))).sort_by(
        [("doc", "ascending"), ("position", "ascending")]
    )
    ids = torch.tensor([table["doc"].to_pylist(), table["position"].to_pylist()]).T
    there = ActivationPrior.from_pretrained(str(prior))
    right = there.log_prob(torch.from_numpy(_rows(store)), steps=4, ids=ids, precision="float32")
    np.testing.assert_allclose(table["nats"].to_numpy(), right.nats.numpy(), rtol=1e-3, atol=0.05)


def test_endpoint_on_a_share_of_the_gpu(prior, tiny_subject, store):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "dmm_ray", "serve", "--prior", str(prior), "--model", str(tiny_subject), "--gpus", "0.5",
        "--subject-gpus", "0.5", "--port", str(port), "--precision", "float32", "--compute-dtype", "float32",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        assert any("ready: " in line for line in process.stderr)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        x = torch.from_numpy(_rows(store)[:50])
        with Client(f"http://127.0.0.1:{port}") as client:
            found = client.log_prob(x.numpy(), steps=4)
            tokens = client.score_text("the cat sat on a red mat").tokens
            written = client.generate("the cat", max_tokens=4)
        right = ActivationPrior.from_pretrained(str(prior)).log_prob(x, steps=4, precision="float32")
        np.testing.assert_allclose(found.nats, right.nats, rtol=1e-3, atol=0.05)
        assert tokens
        assert len(written.tokens) == 4
    finally:
        process.terminate()
        process.wait()
