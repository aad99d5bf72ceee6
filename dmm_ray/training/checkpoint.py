"""Checkpoints of a run: one safetensors file and a marker written last; found by ourselves after any crash."""

from __future__ import annotations

import hashlib
import logging

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dmm_ray.errors import UserError
from dmm_ray.files import exists, filesystem, join, list_files, read_bytes, read_json, write_bytes, write_json
from dmm_ray.training.step import Ema

logger = logging.getLogger(__name__)
STATE, MARKER = "state.safetensors", "complete.json"
ADAM = ("exp_avg", "exp_avg_sq", "step")


def state_tensors(denoiser: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """Everything of a run that changes: weights, their average, the optimiser's moments."""
    tensors = {f"model.{name}": p.detach() for name, p in denoiser.named_parameters()}
    tensors |= {f"ema.{name}": t for name, t in ema.state().items()}
    for name, p in denoiser.named_parameters():
        for key in ADAM:
            if p in optimizer.state:
                tensors[f"{key}.{name}"] = optimizer.state[p][key]
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


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


def save(out: str, samples: int, tensors: dict[str, Tensor], keep: int) -> None:
    """Write the checkpoint after ``samples`` samples, then delete all but the ``keep`` newest complete ones."""
    folder = join(out, "checkpoints", f"{samples:015d}")
    data = safetensors.torch.save(tensors, {"samples": str(samples)})
    write_bytes(join(folder, STATE), data)
    write_json(join(folder, MARKER), {"samples": samples, "sha256": hashlib.sha256(data).hexdigest()})
    for old in complete(out)[:-keep]:
        remove(out, old)


def complete(out: str) -> list[int]:
    """Samples seen of every complete checkpoint, rising."""
    root = join(out, "checkpoints")
    if not exists(root):
        return []
    return sorted(int(path.split("/")[-2]) for path in list_files(root, (MARKER,)))


def load_newest(out: str) -> tuple[int, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole: (samples, tensors), or None. A damaged one is passed over with a warning."""
    for samples in reversed(complete(out)):
        folder = join(out, "checkpoints", f"{samples:015d}")
        try:
            data = read_bytes(join(folder, STATE))
            if hashlib.sha256(data).hexdigest() == read_json(join(folder, MARKER))["sha256"]:
                return samples, safetensors.torch.load(data)
            logger.warning("%s: damaged (its hash is not the recorded one); taking the one before", folder)
        except UserError as e:
            logger.warning("%s; taking the checkpoint before", e)
    return None


def remove(out: str, samples: int | None = None) -> None:
    """Delete one checkpoint, or all of them."""
    folder = join(out, "checkpoints", *([] if samples is None else [f"{samples:015d}"]))
    if exists(folder):
        fs, path = filesystem(folder)
        fs.rm(path, recursive=True)
