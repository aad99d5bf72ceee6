import errno
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.prior.network import Denoiser
from dmm_ray.training import checkpoint
from dmm_ray.training.config import CheckpointRetention
from dmm_ray.training.state import ShardedReader, check_architecture, restore, snapshot
from dmm_ray.training.step import Ema

LAST_2 = CheckpointRetention(2)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2,), value)}


def save_all(out: Path, retention: CheckpointRetention, losses: dict[int, float | None]) -> list[int]:
    """Save a checkpoint a loss; which are left."""
    for samples, loss in losses.items():
        checkpoint.save(str(out), samples, tensors(float(samples)), retention, loss)
    return checkpoint.complete(str(out))


def write(out: Path, every: list[int]) -> None:
    """Save checkpoints beside a run."""
    with checkpoint.CheckpointWriter(str(out), LAST_2) as writer:
        for samples in every:
            writer.save(samples, tensors(float(samples)))


def state(out: Path, samples: int) -> Path:
    return out / "checkpoints" / f"{samples:015d}" / checkpoint.part_name(0, 1)


def test_the_last_k_are_kept(tmp_path):
    assert save_all(tmp_path, LAST_2, dict.fromkeys((100, 200, 300))) == [200, 300]


def test_one_in_n_samples_and_the_best_are_kept(tmp_path):
    losses = {100: 0.5, 200: 0.1, 300: 0.4, 400: None, 500: 0.2, 600: 0.3, 700: 0.3}
    assert save_all(tmp_path, CheckpointRetention(1, every=250, best=True), losses) == [200, 300, 500, 700]
    checkpoint.finish(str(tmp_path), CheckpointRetention(1, every=250, best=True))
    assert checkpoint.complete(str(tmp_path)) == [200, 300, 500]
    checkpoint.finish(str(tmp_path), LAST_2)
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_killed_run_left_is_deleted(tmp_path):
    half = state(tmp_path, 150)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    half.with_name("state-00000-of-00001.safetensors.tmp-0123abcd").write_bytes(b"half of it")
    assert checkpoint.newest(str(tmp_path)) is None
    save_all(tmp_path, LAST_2, {200: None})
    assert not half.parent.exists()


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "missing", "no marker", "broken marker", "old marker"]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage):
    save_all(tmp_path, LAST_2, {200: None, 300: None})
    newest = state(tmp_path, 300)
    data, marker = newest.read_bytes(), newest.with_name("complete.json")
    match damage:
        case "flipped":
            newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "truncated":
            newest.write_bytes(data[:-1])
        case "missing":
            newest.unlink()
        case "no marker":
            marker.unlink()
        case "broken marker":
            marker.write_text("{")
        case "old marker":
            marker.write_text('{"samples": 300, "sha256": "0"}')
    assert checkpoint.newest(str(tmp_path)) == 200
    assert checkpoint.load(str(tmp_path), 200).rows("x", 0, 2).tolist() == [200, 200]
    assert ("falling back to the previous checkpoint" in caplog.text) == (damage != "no marker")


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    save_all(tmp_path, LAST_2, {100: None})
    with pytest.raises(CheckFailed, match="x contains NaN or Inf after 200 samples: no checkpoint written"):
        checkpoint.save(str(tmp_path), 200, tensors(torch.inf), LAST_2)
    assert checkpoint.complete(str(tmp_path)) == [100]


def test_writing_goes_on_beside_the_run(tmp_path, monkeypatch):
    """The second save waits for the first; leaving waits for the last."""
    held, write = threading.Event(), checkpoint.write_bytes

    def slow(uri: str, data: bytes) -> None:
        assert held.wait(10)
        write(uri, data)

    monkeypatch.setattr(checkpoint, "write_bytes", slow)
    with checkpoint.CheckpointWriter(str(tmp_path), LAST_2) as writer:
        writer.save(100, tensors(1.0))
        assert checkpoint.complete(str(tmp_path)) == []
        held.set()
        writer.save(200, tensors(2.0))
        assert 100 in checkpoint.complete(str(tmp_path))
    assert checkpoint.complete(str(tmp_path)) == [100, 200]
    assert not [t for t in threading.enumerate() if t.name.startswith("dmm-checkpoint")]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_writing_starts_no_compute_threads(tmp_path):
    # OpenMP threads of the writer's own make the training step's spin less: it then takes twice as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    large = {"weight": torch.ones(1 << 20)}
    try:
        with checkpoint.CheckpointWriter(str(tmp_path), LAST_2) as writer:
            writer.save(1000, {"weight": torch.ones(4)})
            writer.wait()
            before = set(os.listdir("/proc/self/task"))
            writer.save(2000, large)
            writer.wait()
            assert set(os.listdir("/proc/self/task")) <= before
    finally:
        torch.set_num_threads(threads)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    save_all(tmp_path, LAST_2, {100: None})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for following in ([], [300]):
        with pytest.raises(UserError, match=r"checkpoints/.*: the disk is full; free some space"):
            write(tmp_path, [200, *following])
    assert checkpoint.newest(str(tmp_path)) == 100


def trained(d_model: int, blocks: int) -> tuple[Denoiser, torch.optim.Optimizer, Ema]:
    net = Denoiser(4, d_model, 8, blocks)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(3, 4), torch.rand(3)).sum().backward()
    optimizer.step()
    return net, optimizer, Ema(net, 0.1)


def test_state_goes_round_and_is_a_copy(tmp_path):
    saved, other = trained(6, 2), trained(6, 2)
    copy = snapshot(*saved)
    before = {name: t.clone() for name, t in copy.items()}
    with torch.no_grad():
        for p in saved[0].parameters():
            p.add_(1)
    assert all(torch.equal(copy[name], t) for name, t in before.items())
    checkpoint.save(str(tmp_path), 100, copy | {"interval": torch.zeros(0, 22)}, LAST_2)
    loaded = checkpoint.load(str(tmp_path), 100)
    shapes = loaded.shapes()
    assert shapes.pop("interval") == (0, 22)
    assert loaded.rows("interval", 0, 0).shape == (0, 22)
    check_architecture("here", shapes, other[0])
    restore(loaded, *other)
    assert all(torch.equal(t, before[name]) for name, t in snapshot(*other).items())


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_are_read_as_one(tmp_path, world):
    """Rows of a tensor that lie in several files, some of which have none of them."""
    x, at = torch.arange(10.0).reshape(5, 2), [5 * r // world for r in range(world + 1)]
    uris = []
    for rank, (low, high) in enumerate(pairwise(at)):
        part = {"x": x[low:high].clone(), "step": torch.tensor(3.0)} | ({"one": x} if rank == 0 else {})
        uris.append(str(tmp_path / checkpoint.part_name(rank, world)))
        safetensors.torch.save_file(part, uris[-1])
    joined = ShardedReader(uris)
    assert joined.shapes() == {"x": (5, 2), "step": (), "one": (5, 2)}
    assert joined.rows("step", 0, 0) == 3
    for low in range(6):
        for high in range(low, 6):
            assert torch.equal(joined.rows("x", low, high), x[low:high])


@pytest.mark.parametrize(
    ("shape", "said"),
    [((8, 2), r"in_proj\.bias is \(6,\), here \(8,\)"), ((6, 3), r"layers\.2\..* is missing, here \(")],
)
def test_another_architecture_is_named(shape, said):
    shapes = {name: tuple(t.shape) for name, t in snapshot(*trained(6, 2)).items()}
    with pytest.raises(UserError, match=rf"of another architecture \(model\.{said}.*; choose another --out"):
        check_architecture("here", shapes, trained(*shape)[0])
