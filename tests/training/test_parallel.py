"""Several workers against one: the same rows with the same noise, the same weights; DDP, FSDP2 and accumulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from training.workers import run_workers

from dmm_ray import ActivationStore
from dmm_ray.errors import UserError
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.normalizer import variance_floor
from dmm_ray.store.split import Split
from dmm_ray.training import checkpoint
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.parallel import RankInfo
from dmm_ray.training.step import FlowBatch
from dmm_ray.training.validation import Validation

CPU = torch.device("cpu")


def config(store: str, out: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "activations": store, "out": str(out), "layer": 2, "samples": 8 * 256, "batch": 256, "levels_per_batch": 64,
        "d_model": 32, "d_mlp": 66, "n_blocks": 2, "lr": 3e-3, "precision": "float32", "log_every": 256,
        "checkpoint_every": 3 * 256, "validate_every": 512, "validation_rows": 500, "shuffle_rows": 2000,
        "split": Split(seed=1),
    }  # fmt: skip
    return TrainConfig(**(fields | changes))


def prior_config(config: TrainConfig) -> PriorConfig:
    store = ActivationStore.open(config.activations)
    floor = variance_floor(torch.from_numpy(store.statistics(2).var))
    return PriorConfig(d=32, layers=(2,), **config.network.shape(32)._asdict(), variance_floor=floor)


def result(out: Path | str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights of a finished run, and the numbers of its loss curve."""
    names = ("samples", "loss", "grad_norm", "validation_loss")
    records = [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]
    numbers = [[r[n] if r[n] is not None else -1.0 for n in names] for r in records]
    weights = safetensors.torch.load_file(Path(out) / "model.safetensors")
    return weights, torch.tensor(numbers, dtype=torch.float64)


def assert_close(out: Path | str, other: Path | str, atol: float = 3e-5) -> None:
    """Weights and curve agree to rounding."""
    (weights, curve), (expected, whole) = result(out), result(other)
    torch.testing.assert_close(curve, whole, rtol=1e-4, atol=0)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=atol, msg=name)


def assert_equal(out: Path | str, other: Path | str) -> None:
    (weights, curve), (expected, whole) = result(out), result(other)
    assert torch.equal(curve, whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


Finished = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def finished(train_store: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run on so many workers and what its workers saw and held, made once."""
    folder, found = tmp_path_factory.mktemp("finished"), dict[str, tuple[Path, list[dict[str, Any]]]]()

    def make(world: int, parallel: str = "ddp") -> tuple[Path, list[dict[str, Any]]]:
        name = f"{parallel}{world}"
        if name not in found:
            this = config(train_store, folder / name, parallel=parallel)
            found[name] = folder / name, run_workers(world, this, prior_config(this))
        return found[name]

    return make


@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_workers_sees_the_same_rows_with_the_same_noise(finished, world):
    (one, (whole,)), (out, parts) = finished(1), finished(world)
    batches = [part["seen"].reshape(8, -1, 65) for part in parts]
    assert torch.equal(torch.cat(batches, 1).flatten(0, 1), whole["seen"])
    assert [len(b[0]) for b in batches] == [256 * (r + 1) // world - 256 * r // world for r in range(world)]
    assert_close(out, one)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_workers_learn_what_one_does(finished, world):
    """d_mlp = 66 rows do not divide by 4, nor d_model = 32 by 3: shards are uneven."""
    (one, (alone,)), (out, workers) = finished(1), finished(world, "fsdp")
    assert_close(out, one)
    held = [w["bytes"] for w in workers]
    assert sum(held) == alone["bytes"]
    assert max(held) <= 1.1 * alone["bytes"] / world


def test_a_sharded_run_resumes_to_the_same_bits(finished, train_store, tmp_path):
    this = config(train_store, tmp_path / "out", parallel="fsdp")
    run_workers(2, this, prior_config(this), stop=5)
    folder = tmp_path / "out" / "checkpoints" / f"{5 * 256:015d}"
    names = [checkpoint.part_name(rank, 2) for rank in range(2)]
    assert sorted(p.name for p in folder.iterdir()) == ["complete.json", *names]
    assert [w["first"] for w in run_workers(2, this, prior_config(this))] == [5, 5]
    assert_equal(this.out, finished(2, "fsdp")[0])


@pytest.mark.parametrize(
    ("before", "after"), [((2, "fsdp"), (3, "fsdp")), ((3, "fsdp"), (1, "ddp")), ((2, "ddp"), (2, "fsdp"))]
)
def test_a_run_resumes_on_other_workers(finished, train_store, tmp_path, before, after):
    for (world, parallel), stop, first in ((before, 5, 0), (after, 0, 5)):
        this = config(train_store, tmp_path / "out", parallel=parallel)
        assert {w["first"] for w in run_workers(world, this, prior_config(this), stop)} == {first}
    assert_close(this.out, finished(1)[0])


def test_a_damaged_part_falls_back_to_the_checkpoint_before(finished, train_store, tmp_path):
    this = config(train_store, tmp_path / "out", parallel="fsdp")
    run_workers(2, this, prior_config(this), stop=5)
    part = tmp_path / "out" / "checkpoints" / f"{5 * 256:015d}" / checkpoint.part_name(1, 2)
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [w["first"] for w in run_workers(2, this, prior_config(this))] == [3, 3]
    assert_equal(this.out, finished(2, "fsdp")[0])


@pytest.mark.parametrize(("world", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_gradients_of_pieces_sum_to_those_of_the_whole(finished, train_store, tmp_path, world, parallel):
    """Pieces of at most 50 rows cut runs of 4 rows of one noise level."""
    this = config(train_store, tmp_path / "out", micro_batch=50, parallel=parallel)
    workers = run_workers(world, this, prior_config(this))
    (one, (whole,)) = finished(1)
    batches = [w["seen"].reshape(8, -1, 65) for w in workers]
    assert torch.equal(torch.cat(batches, 1).flatten(0, 1), whole["seen"])
    assert_close(this.out, one)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("most", [2, 3, 10, 64, None])
def test_every_worker_has_as_many_pieces(world, most):
    places = [RankInfo(rank, world, CPU) for rank in range(world)]
    pieces = [p.pieces(64, most) for p in places]
    assert len({len(p) for p in pieces}) == 1
    rows = [i for mine in pieces for piece in mine for i in range(64)[piece]]
    assert rows == list(range(64))
    assert all(0 < p.stop - p.start <= (most or 64) for mine in pieces for p in mine)


def test_values_and_gradients_of_pieces_are_those_of_the_step():
    torch.manual_seed(0)
    this = TrainConfig(activations="a", out="b", batch=64, levels_per_batch=16)
    net, z = Denoiser(6, 12, 16, 2), torch.randn(64, 6)

    def losses(pieces: list[slice]) -> torch.Tensor:
        return torch.cat([FlowBatch(this, 3, piece, z[piece]).loss(net, False) for piece in pieces])

    rank_info = RankInfo(0, 1, CPU)
    cut, whole = losses(rank_info.pieces(64, 10)), losses(rank_info.pieces(64, None))
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(cut.sum(), list(net.parameters())),
        torch.autograd.grad(whole.sum(), list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_validation_of_shares_is_that_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    this = TrainConfig(activations="a", out="b", precision="float32", micro_batch=4)
    net, z = Denoiser(6, 12, 16, 2), torch.randn(5, 6)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
    whole = Validation(this.model_copy(update={"micro_batch": None}), z, RankInfo(0, 1, CPU)).loss(net)
    for world in (1, 2, 3, 8):
        parts = [Validation(this, z, RankInfo(rank, world, CPU)).loss(net) for rank in range(world)]
        assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_worker_counts_that_do_not_fit_together_are_refused():
    for changes, said in (
        ({"workers": 2, "min_workers": 3}, r"min_workers: must not be more than workers \(2\)"),
        ({"workers": 0, "parallel": "fsdp"}, "parallel: fsdp shards over Ray workers"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig(activations="a", out="b", **changes)


def test_another_architecture_is_refused_by_every_worker(train_store, tmp_path):
    small = config(train_store, tmp_path / "out", parallel="fsdp")
    run_workers(2, small, prior_config(small), stop=3)
    large = config(train_store, tmp_path / "out", parallel="fsdp", d_mlp=70)
    with pytest.raises(AssertionError, match=f"{UserError.__name__}: .*of another architecture"):
        run_workers(2, large, prior_config(large))
