"""A prior's folder: ``config.json`` and ``model.safetensors``, nothing pickled. Published folders are read as well."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError
from torch import Tensor

from dmm_ray.config import one_line
from dmm_ray.errors import UserError
from dmm_ray.files import exists, join, make_folder, read_json, write_bytes
from dmm_ray.prior import glp
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.weights import read_tensors

CONFIG, WEIGHTS, CALIBRATION = "config.json", "model.safetensors", "calibration.safetensors"
FILES = (CONFIG, WEIGHTS, CALIBRATION)
"""The files of a prior; the last is optional."""


def save(path: str, config: PriorConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files atomically, the configuration last. Raises UserError without write permission."""
    make_folder(path)
    write_bytes(join(path, WEIGHTS), safetensors.torch.save(tensors, {"format": "pt"}))
    write_bytes(join(path, CONFIG), (config.model_dump_json(indent=2) + "\n").encode())


def load(source: str, revision: str | None = None) -> tuple[PriorConfig, dict[str, Tensor]]:
    """Load a prior, in our format or the published one, from a local folder, an fsspec URI or a Hub id.

    Local weights are memory-mapped rather than read, so they are held only once.

    Raises:
        UserError: missing, not a prior, or damaged.
    """
    path = resolve(source, revision)
    if is_published(path):
        return glp.load(path)
    config = load_config(path)
    tensors = read_tensors(join(path, WEIGHTS))
    for name in ("normalizer.mean", "normalizer.var"):
        if name not in tensors:
            raise UserError(f"{join(path, WEIGHTS)}: has no tensor {name}; this is not a prior's weight file")
        shape, right = tuple(tensors[name].shape), (len(config.layers), config.d)
        if shape != right:
            raise UserError(
                f"{join(path, WEIGHTS)}: {name} has shape {shape}, {CONFIG} asks for {right}; copy the prior again"
            )
    if (tensors["normalizer.var"] < 0).any():
        raise UserError(
            f"{join(path, WEIGHTS)}: normalizer.var holds a negative variance; copy the prior again"
        )
    return config, tensors


def load_config(path: str) -> PriorConfig:
    """The configuration of the prior in a folder. Raises UserError if it is missing or invalid."""
    if is_published(path):
        return glp.load_config(path)
    if not exists(join(path, CONFIG)):
        raise UserError(
            f"{path}: no {CONFIG} here; expected a prior's folder, as `dmm train --out` writes, "
            f"or a published one with {glp.CONFIG}"
        )
    value = read_json(join(path, CONFIG))
    try:
        return PriorConfig.model_validate_json(json.dumps(value))
    except ValidationError as e:
        raise UserError(f"{join(path, CONFIG)}: not a prior's configuration: {one_line(e)}") from e


def is_published(path: str) -> bool:
    """Whether a folder holds a prior in the published format and not in ours."""
    return exists(join(path, glp.CONFIG)) and not exists(join(path, WEIGHTS))


def resolve(source: str, revision: str | None = None) -> str:
    """The local folder or fsspec URI of a prior; for a Hub id, its snapshot in the Hub cache, downloaded if necessary.

    Raises:
        UserError: no such folder, and it cannot be downloaded from the Hub.
    """
    if "://" in source or Path(source).expanduser().is_dir():
        return source
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: no such folder, and not a Hub id of the form owner/name")
    try:
        return _snapshot(source, revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(
            f"{source}: no such folder, and it could not be downloaded from the Hub ({' '.join(str(e).split())[:200]})"
        ) from e


def _snapshot(source: str, revision: str | None) -> str:
    """A snapshot with the files of either format; the newest checkpoint only if there are no final weights."""
    wanted = [*FILES, glp.CONFIG, glp.STATISTICS, glp.WEIGHTS]
    path = snapshot_download(source, revision=revision, allow_patterns=wanted)
    here = Path(path)
    if is_published(path) and not (here / glp.WEIGHTS).exists() and not (here / glp.CHECKPOINTS).exists():
        newest = glp.newest_checkpoint(HfApi().list_repo_files(source, revision=here.name))
        if newest is not None:
            snapshot_download(source, revision=here.name, allow_patterns=[newest])
    return path
