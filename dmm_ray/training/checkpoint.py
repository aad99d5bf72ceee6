"""Checkpoints of a run: one safetensors file per worker that holds a shard of the weights, and a marker written last.

``checkpoints/SAMPLES/state-00000-of-00002.safetensors`` holds the first worker's rows of every tensor, and so on; there
is a single file if every worker has all weights. ``complete.json`` has the SHA-256 of each. Any number of workers can
read them.
"""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.files import (
    exists,
    filesystem,
    join,
    list_files,
    read_json,
    remove_folder,
    sha256,
    write_bytes,
    write_json,
)
from dmm_ray.training.config import CheckpointRetention
from dmm_ray.training.parallel import CpuGroup
from dmm_ray.training.state import ShardedReader

logger = logging.getLogger(__name__)
FOLDER, MARKER = "checkpoints", "complete.json"
NO_DIGEST = bytes(32)


def part_name(rank: int, world_size: int) -> str:
    """The name of the file with one worker's rows."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def save(
    out: str,
    samples: int,
    tensors: dict[str, Tensor],
    retention: CheckpointRetention,
    validation_loss: float | None = None,
    cpu_group: CpuGroup | None = None,
) -> None:
    """Write the checkpoint after ``samples`` samples, then delete those that ``retention`` does not keep.

    Args:
        out: the run's folder.
        samples: seen so far.
        tensors: float32, on the CPU; only this worker's rows if sharded.
        retention: which checkpoints to keep.
        validation_loss: of these weights.
        cpu_group: workers that write their parts concurrently; None if this one writes everything.

    Raises:
        UserError: the disk is full.
        CheckFailed: a tensor contains NaN or Inf. No marker is written if a worker has failed.
    """
    cpu_group, folder, digest = cpu_group or CpuGroup(), _folder(out, samples), NO_DIGEST
    try:
        digest = _write_part(folder, samples, tensors, cpu_group)
    finally:
        # After an error too: the other workers wait here, and learn from the empty digest that this one failed.
        said = cpu_group.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    digests = [bytes(d.tolist()) for d in said]
    try:
        if cpu_group.rank == 0 and NO_DIGEST not in digests:
            files = {part_name(i, cpu_group.world_size): d.hex() for i, d in enumerate(digests)}
            marker = {"samples": samples, "files": files, "validation_loss": validation_loss}
            write_json(join(folder, MARKER), marker)
            prune(out, retention)
    finally:
        cpu_group.gather(
            torch.zeros(1)
        )  # a barrier: no worker begins the next one while folders without a marker are deleted


def _write_part(folder: str, samples: int, tensors: dict[str, Tensor], cpu_group: CpuGroup) -> bytes:
    """Write one worker's file; returns its SHA-256."""
    # numpy, because torch would start another set of OpenMP threads for this thread. With more threads than cores, the
    # threads of the process hardly spin while they wait, and every training step takes twice as long.
    bad = [name for name, t in tensors.items() if not np.isfinite(t.numpy()).all()]
    if bad:
        raise CheckFailed(
            f"{bad[0]} contains NaN or Inf after {samples} samples: no checkpoint written; lower --lr"
        )
    data = safetensors.torch.save(tensors, {"samples": str(samples)})
    write_bytes(join(folder, part_name(cpu_group.rank, cpu_group.world_size)), data)
    return hashlib.sha256(data).digest()


def prune(out: str, retention: CheckpointRetention) -> None:
    """Delete the checkpoints that ``retention`` does not keep, and those that a killed run left half-written."""
    found = complete(out)
    kept = set(found[-retention.last :] if retention.last else [])
    if retention.every:
        firsts = {samples // retention.every: samples for samples in reversed(found)}
        kept |= {samples for block, samples in firsts.items() if block}
    if retention.best:
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
    folder = _folder(out, samples)
    if marked:
        fs, path = filesystem(join(folder, MARKER))
        fs.rm_file(path)
    remove_folder(folder)


class CheckpointWriter:
    """Writes checkpoints one at a time in a background thread while training continues. A context manager.

    An error in a write is raised by the next :meth:`save` or on exit. Arguments as for :func:`save`.
    """

    def __init__(self, out: str, retention: CheckpointRetention, cpu_group: CpuGroup | None = None) -> None:
        self.out, self.retention, self.cpu_group = out, retention, cpu_group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dmm-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, samples: int, tensors: dict[str, Tensor], validation_loss: float | None = None) -> None:
        """Like :func:`save`, once the previous one is written. ``tensors`` must not change afterwards."""
        self.wait()
        arguments = (self.out, samples, tensors, self.retention, validation_loss, self.cpu_group)
        self._pending = self._thread.submit(save, *arguments)

    def wait(self) -> None:
        """Wait until the pending checkpoint is written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
        elif self._pending and (error := self._pending.exception()):
            logger.warning("the pending checkpoint was not written: %s", error)


def complete(out: str) -> list[int]:
    """Samples seen by every complete checkpoint, ascending."""
    root = join(out, FOLDER)
    if not exists(root):
        return []
    return sorted(int(path.split("/")[-2]) for path in list_files(root, (MARKER,)))


def newest(out: str, cpu_group: CpuGroup | None = None) -> int | None:
    """Samples seen by the newest intact checkpoint, or None. Damaged ones are skipped with a warning.

    Collective: every rank of the group must call this; each hashes a part of the files.

    Raises:
        CheckFailed: the ranks found different checkpoints.
    """
    cpu_group = cpu_group or CpuGroup()
    found = complete(out)
    while True:
        samples = found.pop() if found else -1
        said = [int(n) for n in cpu_group.gather(torch.tensor([samples]))]
        if set(said) != {samples}:
            raise CheckFailed(
                f"{out}: workers found different checkpoints; --out must be the same folder for all of them"
            )
        if samples < 0:
            return None
        if all(cpu_group.gather(torch.tensor([_is_whole(_folder(out, samples), cpu_group)]))):
            return samples


def _is_whole(folder: str, cpu_group: CpuGroup) -> bool:
    """Whether this worker's part of the files is intact."""
    try:
        files = _files(folder)
        damaged = [
            name
            for name in sorted(files)[cpu_group.rank :: cpu_group.world_size]
            if not exists(join(folder, name)) or sha256(join(folder, name)) != files[name]
        ]
    except UserError as e:
        logger.warning("%s; falling back to the previous checkpoint", e)
        return False
    if damaged:
        logger.warning(
            "%s: damaged (%s is missing or altered); falling back to the previous checkpoint",
            folder,
            damaged[0],
        )
    return not damaged


def _files(folder: str) -> dict[str, str]:
    """Name and SHA-256 of a checkpoint's files. Raises UserError if its marker is damaged."""
    marker: Any = read_json(join(folder, MARKER))
    files = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{join(folder, MARKER)}: damaged (it lists no files)")
    return files


def load(out: str, samples: int) -> ShardedReader:
    """The tensors of a checkpoint, read lazily."""
    folder = _folder(out, samples)
    return ShardedReader([join(folder, name) for name in sorted(_files(folder))])


def finish(out: str, retention: CheckpointRetention) -> None:
    """After the end of the run: delete all but those that ``retention`` keeps permanently."""
    root = join(out, FOLDER)
    if not exists(root):
        return
    prune(out, retention._replace(last=0))
    if not complete(out):
        remove_folder(root)


def _folder(out: str, samples: int) -> str:
    return join(out, FOLDER, f"{samples:015d}")
