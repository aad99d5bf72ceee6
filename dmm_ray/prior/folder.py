"""A prior's folder: ``config.json`` and ``model.safetensors``, nothing pickled."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError
from torch import Tensor

from dmm_ray.config import one_line
from dmm_ray.errors import UserError
from dmm_ray.files import exists, join, make_folder, read_bytes, read_json, write_bytes
from dmm_ray.prior.config import PriorConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(path: str, config: PriorConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files, each whole or not at all, the configuration last. Raises UserError without permission."""
    make_folder(path)
    write_bytes(join(path, WEIGHTS), safetensors.torch.save(tensors, {"format": "pt"}))
    write_bytes(join(path, CONFIG), (config.model_dump_json(indent=2) + "\n").encode())


def load(source: str, revision: str | None = None) -> tuple[PriorConfig, dict[str, Tensor]]:
    """Read both files from a local folder, an fsspec URI or a Hub id.

    Raises:
        UserError: missing, not a prior, or damaged.
    """
    path = _resolve(source, revision)
    config = load_config(path)
    weights = read_bytes(join(path, WEIGHTS))
    try:
        tensors = safetensors.torch.load(weights)
    except safetensors.SafetensorError as e:
        raise UserError(f"{join(path, WEIGHTS)}: damaged ({e}); copy or train the prior again") from e
    for name in ("normalizer.mean", "normalizer.var"):
        if name not in tensors:
            raise UserError(f"{join(path, WEIGHTS)}: has no tensor {name}; this is not a prior's weight file")
    return config, tensors


def load_config(path: str) -> PriorConfig:
    """The configuration of the prior in a folder. Raises UserError if there is none or it is not valid."""
    if not exists(join(path, CONFIG)):
        raise UserError(f"{path}: no {CONFIG} here; expected a prior's folder, as `dmm train --out` writes")
    value = read_json(join(path, CONFIG))
    try:
        return PriorConfig.model_validate_json(json.dumps(value))
    except ValidationError as e:
        raise UserError(f"{join(path, CONFIG)}: not a prior's configuration: {one_line(e)}") from e


def _resolve(source: str, revision: str | None) -> str:
    if "://" in source or Path(source).is_dir():
        return source
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: no such folder, and not a Hub id of the form owner/name")
    try:
        return snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(
            f"{source}: no such folder, and the Hub did not give it ({' '.join(str(e).split())[:200]})"
        ) from e
