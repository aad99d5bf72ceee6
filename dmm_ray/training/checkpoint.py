"""Checkpoints of a run: one safetensors file and a marker written last; found by ourselves after any crash."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.files import (
    exists,
    filesystem,
    join,
    list_files,
    read_bytes,
    read_json,
    sha256,
    write_bytes,
    write_json,
)
from dmm_ray.training.config import Policy
from dmm_ray.training.step import Ema

logger = logging.getLogger(__name__)
FOLDER, STATE, MARKER = "checkpoints", "state.safetensors", "complete.json"
ADAM = ("exp_avg", "exp_avg_sq", "step")
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOK_S, ASK_S, AGREE_BATCHES = 1.0, 5.0, 4


def state_tensors(denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """A copy on the CPU of everything of a run that changes: weights, their average, the optimiser's moments."""
    tensors = {f"model.{name}": p.detach() for name, p in denoiser.named_parameters()}
    tensors |= {f"ema.{name}": t for name, t in ema.state().items()}
    for name, p in denoiser.named_parameters():
        for key in ADAM:
            if p in optimizer.state:
                tensors[f"{key}.{name}"] = optimizer.state[p][key]
    return {
        name: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()
    }


def load_tensors(
    tensors: dict[str, Tensor], denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema
) -> None:
    """The inverse of :func:`state_tensors`, in place."""
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            state = {key: tensors[f"{key}.{name}"] for key in ADAM}
            optimizer.state[p] = {
                k: t.to(p.device) if k != "step" or p.is_cuda else t for k, t in state.items()
            }
        ema.load({name: tensors[f"ema.{name}"] for name, _ in denoiser.named_parameters()})


def check_architecture(out: str, tensors: dict[str, Tensor], denoiser: nn.Module) -> None:
    """Raises UserError naming the first tensor in which a checkpoint found in ``out`` does not fit ``denoiser``."""
    wanted = {
        f"{kind}.{name}": () if kind == "step" else tuple(p.shape)
        for name, p in denoiser.named_parameters()
        for kind in ("model", "ema", *ADAM)
    }
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted | found, key=lambda name: (not name.startswith("model."), name)):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{join(out, FOLDER)}: of another architecture ({name} is {found.get(name, 'missing')}, "
                f"here {wanted.get(name, 'not wanted')}); choose another --out or delete that folder"
            )


def save(
    out: str, samples: int, tensors: dict[str, Tensor], policy: Policy, validation_loss: float | None = None
) -> None:
    """Write the checkpoint after ``samples`` samples, then delete those that ``policy`` does not keep.

    Raises:
        UserError: no space on the disk.
        CheckFailed: a tensor is not finite; nothing is written.
    """
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise CheckFailed(f"{bad[0]} is not finite after {samples} samples: no checkpoint of it; lower --lr")
    folder = join(out, FOLDER, f"{samples:015d}")
    data = safetensors.torch.save(tensors, {"samples": str(samples)})
    marker = {"samples": samples, "sha256": hashlib.sha256(data).hexdigest()}
    with room(folder):
        write_bytes(join(folder, STATE), data)
        write_json(join(folder, MARKER), marker | {"validation_loss": validation_loss})
    prune(out, policy)


@contextmanager
def room(uri: str) -> Iterator[None]:
    """Make a full disk a UserError that names ``uri``."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise UserError(
            f"{uri}: the disk is full; free some space and run the same command again, which goes on from the last "
            "checkpoint"
        ) from e


def prune(out: str, policy: Policy) -> None:
    """Delete the checkpoints that ``policy`` does not keep, and what a killed run left half-written."""
    found = complete(out)
    kept = set(found[-policy.last :] if policy.last else [])
    if policy.every:
        firsts = {samples // policy.every: samples for samples in reversed(found)}
        kept |= {samples for block, samples in firsts.items() if block}
    if policy.best:
        losses = {samples: loss for samples in found if (loss := _loss(out, samples)) is not None}
        kept |= {min(losses, key=losses.__getitem__)} if losses else set()
    for samples in {int(path.split("/")[-2]) for path in list_files(join(out, FOLDER))} - kept:
        _remove(out, samples, samples in found)


def _loss(out: str, samples: int) -> float | None:
    """The validation loss of a checkpoint."""
    try:
        return read_json(join(_folder(out, samples), MARKER))["validation_loss"]
    except (UserError, KeyError, TypeError) as e:
        logger.warning("%s: no validation loss (%s)", _folder(out, samples), e)
        return None


def _remove(out: str, samples: int, marked: bool) -> None:
    """Delete one checkpoint, its marker first."""
    fs, path = filesystem(_folder(out, samples))
    if marked:
        fs.rm(f"{path}/{MARKER}")
    if fs.exists(path):
        fs.rm(path, recursive=True)


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, while the run goes on. A context manager.

    An error of a write is raised by the next :meth:`save`, or on leaving.
    """

    def __init__(self, out: str, policy: Policy) -> None:
        self.out, self.policy = out, policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dmm-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, samples: int, tensors: dict[str, Tensor], validation_loss: float | None = None) -> None:
        """As :func:`save`, once the one before is written. ``tensors`` must not change afterwards."""
        self.wait()
        self._pending = self._thread.submit(save, self.out, samples, tensors, self.policy, validation_loss)

    def wait(self) -> None:
        """Until the checkpoint under way is written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
        elif self._pending and (error := self._pending.exception()):
            logger.warning("the checkpoint under way was not written: %s", error)


def complete(out: str) -> list[int]:
    """Samples seen of every complete checkpoint, rising."""
    root = join(out, FOLDER)
    if not exists(root):
        return []
    return sorted(int(path.split("/")[-2]) for path in list_files(root, (MARKER,)))


def newest(out: str) -> int | None:
    """Samples of the newest checkpoint that is whole, or None. A damaged one is passed over with a warning."""
    for samples in reversed(complete(out)):
        folder = _folder(out, samples)
        try:
            if not exists(join(folder, STATE)):
                logger.warning("%s: damaged (%s is missing); taking the one before", folder, STATE)
            elif sha256(join(folder, STATE)) == read_json(join(folder, MARKER)).get("sha256"):
                return samples
            else:
                logger.warning(
                    "%s: damaged (its hash is not the recorded one); taking the one before", folder
                )
        except UserError as e:
            logger.warning("%s; taking the one before", e)
    return None


def load(out: str, samples: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return safetensors.torch.load(read_bytes(join(_folder(out, samples), STATE)))


def finish(out: str, policy: Policy) -> None:
    """After the end of the run: delete all but those that ``policy`` keeps for ever."""
    root = join(out, FOLDER)
    if not exists(root):
        return
    prune(out, policy._replace(last=0))
    if not complete(out):
        fs, path = filesystem(root)
        fs.rm(path, recursive=True)


def _folder(out: str, samples: int) -> str:
    return join(out, FOLDER, f"{samples:015d}")


class Notice(Enum):
    """What the world outside wants of a run after a batch."""

    GO_ON = "go on"
    SAVE = "save a checkpoint and go on"
    STOP = "save a checkpoint and end"


class RayNotices:
    """Stop requests of the driver and preemption notices of Ray, agreed on by all workers.

    The first worker looks now and then. What it saw travels by a sum on the CPU that is begun after one batch and read
    a few batches later, so that no worker waits for it and no device is synchronised.
    """

    def __init__(self, request: str, rank: int, world: int) -> None:
        self.request, self.rank, self.preempted = request, rank, list[str]()
        self.group = dist.new_group(backend="gloo") if world > 1 else None
        self.seen, self.work = torch.zeros(2), None
        self.looked = self.asked = 0.0

    def __call__(self, batches: int) -> Notice:
        """What to do after so many batches."""
        if batches % AGREE_BATCHES:
            return Notice.GO_ON
        if self.work is not None:
            self.work.wait()
        stop, ask = self.seen.tolist()
        self._look()
        if stop:
            return Notice.STOP
        return Notice.SAVE if ask and self._preempted() else Notice.GO_ON

    def _look(self) -> None:
        """Begin the next agreement: (stop, time to ask Ray)."""
        now, stop, ask = time.monotonic(), False, False
        if self.rank == 0 and now - self.looked >= LOOK_S:
            self.looked, stop = now, exists(self.request)
        if self.rank == 0 and now - self.asked >= ASK_S:
            self.asked, ask = now, True
        self.seen = torch.tensor([float(stop), float(ask)])
        if self.group is not None:
            self.work = dist.all_reduce(self.seen, group=self.group, async_op=True)

    def _preempted(self) -> bool:
        """Whether Ray says that further nodes will be taken away; every worker asks at once, as Ray wants it."""
        import ray.train

        info = ray.train.get_preemption_info()
        nodes = info.preempted_node_ids if info else []
        new, self.preempted = nodes != self.preempted and bool(nodes), nodes
        return new
