"""The line that says where the demo stands, and the time that training gets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dmm_ray.demo import steps as module
from dmm_ray.demo.run import LEAST_SHARE, TRAIN_OVERHEAD_S, DemoConfig, _training_minutes, demo
from dmm_ray.demo.steps import STEPS, Steps
from dmm_ray.errors import UserError


class Clock:
    """``time.monotonic`` of the module, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_each_step_says_which_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    flow = Steps(5.5)
    with caplog.at_level(logging.INFO):
        flow.begin("extract")
        clock.now += 40  # slower than usual
        flow.begin("train")
        clock.now += 190
        flow.begin("evaluate")
        clock.now += 80
        flow.begin("serve")
    assert [record.getMessage() for record in caplog.records] == [
        "step 1 of 4: extract, 0:00 so far, about 5:30 left",
        "step 2 of 4: train, 0:40 so far, about 4:50 left",
        "step 3 of 4: evaluate, 3:50 so far, about 1:55 left",
        "step 4 of 4: serve, 5:10 so far, about 0:25 left",
    ]
    clock.now += 60  # later than expected
    assert flow.line() == "step 4 of 4: serve, 6:10 so far, about 0:00 left"


def test_without_a_time_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    flow = Steps(None)
    flow.begin("train")
    assert flow.line() == "step 2 of 4: train, 0:00 so far"


def test_training_gets_what_the_others_leave_and_never_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock(monkeypatch)
    flow, prior = Steps(5.5), str(tmp_path / "prior")
    clock.now += 20
    rest = STEPS["evaluate"] + STEPS["serve"] + TRAIN_OVERHEAD_S
    assert _training_minutes(DemoConfig(), flow, prior) == round((330 - 20 - rest) / 60, 2)
    clock.now += 1000
    assert _training_minutes(DemoConfig(), flow, prior) == round(LEAST_SHARE * 330 / 60, 2)
    assert _training_minutes(DemoConfig(samples=1000), flow, prior) is None


def test_a_time_and_a_number_of_samples_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^minutes: excludes samples"):
        demo(DemoConfig(minutes=1, samples=10, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
