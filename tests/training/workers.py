"""Workers of a run as processes on this machine, joined by gloo: what Ray Train would start, in a second."""

from __future__ import annotations

import multiprocessing
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmm_ray.prior.config import PriorConfig
from dmm_ray.training import loop
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.parallel import RankInfo, local_shard
from dmm_ray.training.signals import RunSignal


def run_workers(world: int, config: TrainConfig, prior: PriorConfig, stop: int = 0) -> list[dict[str, Any]]:
    """Train on so many workers until batch ``stop``, or to the end; what :func:`work` gives of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmm_ray.training.loop"])  # so that a worker starts in a moment
    meet = Path(f"{config.out}.meet")
    meet.unlink(missing_ok=True)
    with ProcessPoolExecutor(world, mp_context=context) as pool:
        futures = [pool.submit(work, rank, world, str(meet), config, prior, stop) for rank in range(world)]
        found = [future.result(timeout=120) for future in futures]
    errors = [f["error"] for f in found if "error" in f]
    assert not errors, "\n".join(errors)
    return found


def work(
    rank: int, world: int, meet: str, config: TrainConfig, prior: PriorConfig, stop: int
) -> dict[str, Any]:
    """One worker: every (u, z_u, target) it saw, and the bytes of weights, average and moments it holds."""
    torch.set_num_threads(1)
    seen: list[torch.Tensor] = []

    class Seen(loop.FlowBatch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen.append(torch.cat([self.u_B[:, None], self.z_u, self.target], 1))

    plain, loop.FlowBatch = loop.FlowBatch, Seen
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=world)
    try:
        run = loop.Trainer(config, prior, RankInfo(rank, world, torch.device("cpu")))
        first = run.batch
        run.train(lambda done: RunSignal.STOP if done == stop else RunSignal.CONTINUE)
        held = [*run.denoiser.parameters(), *run.ema.average]
        held += [t for state in run.optimizer.state.values() for t in state.values() if t.ndim]
        return {
            "first": first,
            "seen": torch.cat(seen),
            "bytes": sum(local_shard(t.detach()).nbytes for t in held),
        }
    except Exception:  # noqa: BLE001 - told to the test, which fails with it
        return {"error": traceback.format_exc()}
    finally:
        loop.FlowBatch = plain
        dist.destroy_process_group()
