"""Checkpoints of a run: a safetensors file for each worker that holds weights of its own, and a marker written last.

``checkpoints/SAMPLES/state-00000-of-00002.safetensors`` holds the first worker's rows of every tensor, and so on; there
is one file where every worker has all weights. ``complete.json`` has the SHA-256 of each. Any number of workers can
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
from dmm_ray.training.config import Policy
from dmm_ray.training.parallel import Team
from dmm_ray.training.state import ShardedReader

logger = logging.getLogger(__name__)
FOLDER, MARKER = "checkpoints", "complete.json"
NO_DIGEST = bytes(32)


def part_name(rank: int, world: int) -> str:
    """The file with one worker's rows."""
    return f"state-{rank:05d}-of-{world:05d}.safetensors"


def save(
    out: str,
    samples: int,
    tensors: dict[str, Tensor],
    policy: Policy,
    validation_loss: float | None = None,
    team: Team | None = None,
) -> None:
    """Write the checkpoint after ``samples`` samples, then delete those that ``policy`` does not keep.

    Args:
        out: the run's folder.
        samples: seen so far.
        tensors: float32, on the CPU; of each worker's part its rows.
        policy: what stays.
        validation_loss: of these weights.
        team: workers that each write a part of it, at once; None where this one writes all.

    Raises:
        UserError: no space on the disk.
        CheckFailed: a tensor is not finite. No marker is written where a worker has failed.
    """
    team, folder, digest = team or Team(), _folder(out, samples), NO_DIGEST
    try:
        digest = _write_part(folder, samples, tensors, team)
    finally:
        said = team.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    digests = [bytes(d.tolist()) for d in said]
    try:
        if team.rank == 0 and NO_DIGEST not in digests:
            files = {part_name(i, team.world): d.hex() for i, d in enumerate(digests)}
            marker = {"samples": samples, "files": files, "validation_loss": validation_loss}
            write_json(join(folder, MARKER), marker)
            prune(out, policy)
    finally:
        team.gather(torch.zeros(1))  # nobody begins the next one while folders without a marker are deleted


def _write_part(folder: str, samples: int, tensors: dict[str, Tensor], team: Team) -> bytes:
    """Write one worker's file; returns its SHA-256."""
    # numpy: torch would start OpenMP threads of this thread's own, after which all of the process's threads, being
    # more than the cores, hardly spin while they wait, and every training step takes twice as long.
    bad = [name for name, t in tensors.items() if not np.isfinite(t.numpy()).all()]
    if bad:
        raise CheckFailed(f"{bad[0]} is not finite after {samples} samples: no checkpoint of it; lower --lr")
    data = safetensors.torch.save(tensors, {"samples": str(samples)})
    write_bytes(join(folder, part_name(team.rank, team.world)), data)
    return hashlib.sha256(data).digest()


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
    folder = _folder(out, samples)
    if marked:
        fs, path = filesystem(join(folder, MARKER))
        fs.rm_file(path)
    remove_folder(folder)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, while the run goes on. A context manager.

    An error of a write is raised by the next :meth:`save`, or on leaving. Arguments as of :func:`save`.
    """

    def __init__(self, out: str, policy: Policy, team: Team | None = None) -> None:
        self.out, self.policy, self.team = out, policy, team
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dmm-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, samples: int, tensors: dict[str, Tensor], validation_loss: float | None = None) -> None:
        """As :func:`save`, once the one before is written. ``tensors`` must not change afterwards."""
        self.wait()
        arguments = (self.out, samples, tensors, self.policy, validation_loss, self.team)
        self._pending = self._thread.submit(save, *arguments)

    def wait(self) -> None:
        """Until the checkpoint under way is written."""
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
            logger.warning("the checkpoint under way was not written: %s", error)


def complete(out: str) -> list[int]:
    """Samples seen of every complete checkpoint, rising."""
    root = join(out, FOLDER)
    if not exists(root):
        return []
    return sorted(int(path.split("/")[-2]) for path in list_files(root, (MARKER,)))


def newest(out: str, team: Team | None = None) -> int | None:
    """Samples of the newest checkpoint that is whole, or None. A damaged one is passed over with a warning.

    The workers of a team ask at once, and each hashes a part of the files.

    Raises:
        CheckFailed: they found different ones.
    """
    team = team or Team()
    found = complete(out)
    while True:
        samples = found.pop() if found else -1
        said = [int(n) for n in team.gather(torch.tensor([samples]))]
        if set(said) != {samples}:
            raise CheckFailed(
                f"{out}: workers found different checkpoints; --out must be one folder to all of them"
            )
        if samples < 0:
            return None
        if all(team.gather(torch.tensor([_is_whole(_folder(out, samples), team)]))):
            return samples


def _is_whole(folder: str, team: Team) -> bool:
    """Whether this worker's part of the files is there as it was written."""
    try:
        files = _files(folder)
        damaged = [
            name
            for name in sorted(files)[team.rank :: team.world]
            if not exists(join(folder, name)) or sha256(join(folder, name)) != files[name]
        ]
    except UserError as e:
        logger.warning("%s; taking the one before", e)
        return False
    if damaged:
        logger.warning(
            "%s: damaged (%s is missing or not as recorded); taking the one before", folder, damaged[0]
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
    """The tensors of a checkpoint, read when they are asked for."""
    folder = _folder(out, samples)
    return ShardedReader([join(folder, name) for name in sorted(_files(folder))])


def finish(out: str, policy: Policy) -> None:
    """After the end of the run: delete all but those that ``policy`` keeps for ever."""
    root = join(out, FOLDER)
    if not exists(root):
        return
    prune(out, policy._replace(last=0))
    if not complete(out):
        remove_folder(root)


def _folder(out: str, samples: int) -> str:
    return join(out, FOLDER, f"{samples:015d}")
