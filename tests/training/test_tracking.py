import json
import re

import pytest
import torch

from dmm_ray.errors import CheckFailed
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.metrics_window import MetricsWindow, batch_metrics, means, peak_tflops
from dmm_ray.training.tracking import Tracker, flat, read_stats, run_id, status_line

CPU = torch.device("cpu")
CONFIG = TrainConfig(activations="a", out="runs/mine", samples=1000 * 8, batch=8, levels_per_batch=8)
RECORD = {
    "samples": 2000,
    "loss": 0.5,
    "lr": 1e-3,
    "samples_per_s": 100.0,
    "grad_norm": 2.0,
    "validation_loss": None,
    "loss_by_level": [0.1, None, *[0.5] * 8],
    "data_wait": 0.25,
    "tflops": 0.01,
    "memory_gb": 1.5,
    "workers": 3,
}


def figures(losses: list[float], u: list[float], norm: float = 1.0, first: int = 0) -> torch.Tensor:
    return batch_metrics(torch.tensor(losses), torch.tensor(u), torch.tensor(norm), first, 8)


def window(batch: int = 0, past: torch.Tensor | None = None) -> MetricsWindow:
    return MetricsWindow(CONFIG, batch, past, 0, 1, CPU)


def test_losses_by_level():
    """Decile k holds the levels 100 k + 1 to 100 (k + 1) over 1000."""
    u = [0.001, 0.1, 0.101, 0.2, 0.901, 1.0, 0.5, 0.5]
    found = window()
    found.add(figures([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 6.0], u))
    found.add(figures([1.0] * 8, u))
    numbers = means(found.sums())
    assert numbers["loss"] == pytest.approx((34 / 8 + 1) / 2)
    assert numbers["loss_by_level"] == [1.5, 3.5, None, None, 3.5, None, None, None, None, 2.0]
    assert numbers["grad_norm"] == 1.0


def test_every_level_has_its_decile():
    u = torch.arange(1, 1001) / 1000
    counts = batch_metrics(torch.ones(1000), u, torch.tensor(1.0), 0, 1000)[12:22]
    assert counts.tolist() == [100.0] * 10


def test_an_interval_that_was_interrupted_gives_the_same_numbers():
    torch.manual_seed(0)
    batches = [
        figures(torch.rand(8).tolist(), torch.rand(8).add(0.001).clamp(max=1).tolist()) for _ in range(9)
    ]
    whole, begun = window(), window()
    for batch in batches:
        whole.add(batch)
    for batch in batches[:4]:
        begun.add(batch)
    rest = window(4, begun.sums())
    for batch in batches[4:]:
        rest.add(batch)
    assert torch.equal(rest.sums(), whole.sums())
    assert means(rest.sums()) == means(whole.sums())


@pytest.mark.parametrize(
    ("losses", "norm", "said"),
    [
        ([1.0, torch.nan, 1.0, torch.inf], 1.0, "loss is nan between samples 45 and 48;"),
        ([1.0, 1.0, 1.0, 1.0], torch.inf, "gradient's norm is inf between samples 40 and 48;"),
    ],
)
def test_what_is_not_finite_is_named(losses, norm, said):
    """The share is the second half of batch 5; batch 6 is bad because of it."""
    found = window(3)
    for _ in range(2):
        found.add(figures([1.0] * 4, [0.5] * 4, first=4))
    found.add(figures(losses, [0.5] * 4, norm, first=4))
    found.add(figures([torch.nan] * 4, [0.5] * 4, torch.nan, first=4))
    with pytest.raises(CheckFailed, match=said):
        found.sums()


def test_speed():
    config = CONFIG.model_copy(update={"peak_tflops": 2.0})
    found = MetricsWindow(config, 0, None, 0, 1, CPU)
    found.restart(1.0)
    found.started -= 10.0
    for _ in range(5):
        found.add(figures([1.0] * 8, [0.5] * 8))
    speed = found.speed(1e12, 3.0)
    assert speed["samples_per_s"] == pytest.approx(4.0, rel=0.01)
    assert speed["data_wait"] == pytest.approx(0.2, rel=0.01)
    assert speed["tflops"] == pytest.approx(0.5, rel=0.01)
    assert speed["utilisation"] == pytest.approx(0.25, rel=0.01)
    assert "utilisation" not in window().speed(1e12, 0.0)
    assert peak_tflops(CONFIG, CPU) is None


def test_the_status_line_names_its_columns():
    line = status_line(RECORD, 8000)
    assert line.startswith("samples 0.002M/0.008M (25%)  loss 0.5000  by level 0.10/-/0.50/")
    assert line.endswith("workers 3  TFLOP/s 0.01  wait 25%  memory 1.5 GB  left 60 s")
    line = status_line(RECORD | {"validation_loss": 0.4, "utilisation": 0.51}, 8000)
    assert "val 0.4000" in line
    assert "utilisation 51%" in line


def test_a_resumed_tracker_drops_what_came_after_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = CONFIG.model_copy(update={"out": str(tmp_path)})
    tracker = Tracker(config, 0, {}, on_ray=False)
    for samples in (100, 200, 300):
        tracker.log(RECORD | {"samples": samples})
    resumed = Tracker(config, 200, {}, on_ray=False)
    resumed.log(RECORD | {"samples": 250})
    assert [r["samples"] for r in read_stats(str(tmp_path))] == [100, 200, 250]
    assert all(json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines())


def test_wandb_gets_named_numbers_under_the_run_s_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "mine").mkdir()
    config = CONFIG.model_copy(update={"out": str(tmp_path / "mine")})
    tracker = Tracker(config, 0, {"parameters": 3}, on_ray=False)
    run = tracker.run
    assert (run.id, run.name) == (run_id(config), "mine")
    assert run.config["parameters"] == 3
    tracker.log(RECORD)
    tracker.close()
    assert list((tmp_path / "mine" / "wandb").glob("offline-run-*/run-mine-*.wandb"))
    numbers = flat(RECORD)
    assert numbers["loss_by_level/0"] == 0.1
    assert numbers["data_wait"] == 0.25
    assert not {"loss_by_level/1", "validation_loss", "loss_by_level"} & set(numbers)


def test_an_id_of_its_own_for_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outs = ["w/run#1", "w/run:1", "w/run/1", "v/1", "s3://bucket/run?x=%1", "w/" + "long" * 50]
    ids = [run_id(CONFIG.model_copy(update={"out": out})) for out in outs]
    assert len(set(ids)) == len(outs)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", one) for one in ids)
    same = (
        CONFIG.model_copy(update={"out": out}) for out in ("w/run#1", str(tmp_path / "w" / "run#1") + "/")
    )
    assert len(set(map(run_id, same))) == 1


@pytest.mark.parametrize("name", ["run#1", "run:1 [a]"])
def test_any_name_is_tracked_offline(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = CONFIG.model_copy(update={"out": str(tmp_path / name), "wandb": "offline"})
    tracker = Tracker(config, 0, {}, on_ray=False)
    assert tracker.run is not None
    tracker.log(RECORD)
    tracker.close()
    assert read_stats(config.out) == [RECORD]


def test_a_tracker_that_fails_never_stops_a_training(tmp_path, monkeypatch, caplog):
    import wandb

    def fail(**_options):
        raise wandb.errors.CommError("no such\nproject")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", fail)
    tracker = Tracker(CONFIG.model_copy(update={"out": str(tmp_path)}), 0, {}, on_ray=False)
    tracker.log(RECORD)
    tracker.close()
    assert read_stats(str(tmp_path)) == [RECORD]
    assert "wandb: no such project; the run continues without it" in caplog.text
