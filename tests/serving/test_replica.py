"""The deployment of a prior as a plain object, on an event loop of the test."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.serving.deployments.calls import Call
from dmm_ray.serving.deployments.prior import PriorDeployment

SAMPLE = (("layer", None), ("seed", 0), ("steps", 2))


def deployment(hung_s: float = 60.0) -> Any:
    return PriorDeployment.func_or_class("cpu", "float32", 1, 64, 0.0, hung_s)  # type: ignore[attr-defined]


def ids(n: int) -> dict[str, np.ndarray]:
    return {"ids": np.stack([np.arange(n), np.zeros(n, int)], axis=1)}


def test_it_takes_new_weights_and_keeps_the_old_ones_if_they_do_not_load(
    single: str, other: str, tmp_path: Path
) -> None:
    async def main() -> None:
        d = deployment()
        await d.check_health()  # Serve asks before it configures
        await d.reconfigure({"source": single})
        await d.check_health()
        first = await d.compute(Call("sample", SAMPLE), ids(3))
        with pytest.raises(UserError):
            await d.reconfigure({"source": str(tmp_path)})
        same = await d.compute(Call("sample", SAMPLE), ids(3))
        np.testing.assert_array_equal(first["activations"], same["activations"])
        await d.reconfigure({"source": other})
        new = await d.compute(Call("sample", SAMPLE), ids(3))
        assert not np.allclose(first["activations"], new["activations"])
        assert (await d.describe()).layers == (2,)

    asyncio.run(main())


def test_a_prior_whose_answers_are_not_finite_is_not_served(single: str, tmp_path: Path) -> None:
    weights = load_file(f"{single}/model.safetensors")
    weights["denoiser.out_proj.bias"].fill_(3e38)  # finite, as a prior that loads is: its answers overflow
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(single) / "config.json").read_bytes())

    async def main() -> None:
        with pytest.raises(CheckFailed, match="NaN or Inf"):
            await deployment().reconfigure({"source": str(tmp_path)})

    asyncio.run(main())


def test_a_solver_call_that_does_not_end_is_unhealthy(single: str) -> None:
    async def main() -> None:
        d = deployment(hung_s=0.05)
        await d.reconfigure({"source": single})
        long = (("layer", None), ("seed", 0), ("steps", 400))
        busy = asyncio.create_task(d.compute(Call("sample", long), ids(64)))
        with pytest.raises(RuntimeError, match=r"more than 0\.05 s"):
            await until_unhealthy(d, busy)
        await busy
        await d.check_health()

    asyncio.run(main())


async def until_unhealthy(d: Any, busy: asyncio.Task[Any]) -> None:
    while not busy.done():
        await d.check_health()
