"""Reading and writing folders of published Generative Latent Priors (Luo et al. 2026).

``config.yaml``; ``rep_statistics.pt``, a torch file of ``{"mean", "var"}``; ``final.safetensors`` or
``checkpoints/epoch_N.safetensors``. Their network is ours under another prefix: ``model.`` for ``denoiser.``.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import struct
from collections.abc import Iterable

import safetensors.torch
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.files import exists, join, list_files, make_folder, read_bytes, write_bytes
from dmm_ray.prior import glp_config
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.glp_config import Description
from dmm_ray.prior.network import Denoiser
from dmm_ray.prior.weights import read_tensors

logger = logging.getLogger(__name__)
CONFIG, STATISTICS, WEIGHTS, CHECKPOINTS = (
    "config.yaml",
    "rep_statistics.pt",
    "final.safetensors",
    "checkpoints",
)
THEIRS, OURS = "model.", "denoiser."
DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    OSError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
"""What ``torch.load`` raises on truncated or bit-flipped files, besides UnpicklingError."""


def load(path: str) -> tuple[PriorConfig, dict[str, Tensor]]:
    """The configuration and the float32 tensors ``denoiser.*``, ``normalizer.mean`` and ``.var`` (L, d).

    Raises:
        UserError: a file is missing, damaged or inconsistent with the others.
    """
    config, mean, var = _described(path)
    uri = join(path, weights_name(path))
    logger.info("%s: a published prior, weights from %s", path, uri)
    found = read_tensors(uri)
    _check_weights(uri, config, found)
    tensors = {OURS + name.removeprefix(THEIRS): found.pop(name) for name in list(found)}
    return config, tensors | {"normalizer.mean": mean, "normalizer.var": var}


def load_config(path: str) -> PriorConfig:
    """The configuration alone; the statistics are read for the variance floor. Raises like :func:`load`."""
    return _described(path)[0]


def save(path: str, config: PriorConfig, tensors: dict[str, Tensor]) -> None:
    """Write the three files, the configuration last. Layers not modelled get mean 0 and variance 1.

    Raises:
        UserError: the format cannot represent the prior, or no write permission.
    """
    if config.base != "none":
        raise UserError(
            f"prior: has a {config.base} base, which the published format cannot hold; train one with --base none"
        )
    statistics = {
        name: _by_block(config, tensors[f"normalizer.{name}"], name == "var") for name in ("mean", "var")
    }
    buffer = io.BytesIO()
    torch.save(statistics, buffer)
    make_folder(path)
    weights = {THEIRS + k.removeprefix(OURS): v for k, v in tensors.items() if k.startswith(OURS)}
    write_bytes(join(path, WEIGHTS), safetensors.torch.save(weights, {"format": "pt"}))
    write_bytes(join(path, STATISTICS), buffer.getvalue())
    glp_config.write(join(path, CONFIG), config)


def weights_name(path: str) -> str:
    """The weight file's path within a folder: the final one, else the newest checkpoint. Raises UserError if none."""
    if exists(join(path, WEIGHTS)):
        return WEIGHTS
    folder = join(path, CHECKPOINTS)
    newest = newest_checkpoint(list_files(folder) if exists(folder) else [])
    if newest is None:
        raise UserError(
            f"{path}: neither {WEIGHTS} nor {CHECKPOINTS}/epoch_N.safetensors here; copy one of them from the source"
        )
    return newest


def newest_checkpoint(names: Iterable[str]) -> str | None:
    """The checkpoint with the highest number among file names, as a path within the folder."""
    found = [m for name in names if (m := re.search(r"(?:^|/)checkpoints/(epoch_(\d+)\.safetensors)$", name))]
    return f"{CHECKPOINTS}/{max(found, key=lambda m: int(m[2]))[1]}" if found else None


def _described(path: str) -> tuple[PriorConfig, Tensor, Tensor]:
    """The configuration, the means and the variances (L, d)."""
    description = glp_config.read(join(path, CONFIG))
    uri = join(path, STATISTICS)
    statistics = _read_statistics(uri)
    mean, var = (_by_layer(uri, name, statistics[name], description) for name in ("mean", "var"))
    config = description.prior_config(_smallest(uri, var))
    if zeros := int((var == 0).sum()):
        logger.warning("%s: %d variances are zero; %.3g is used for them", uri, zeros, config.variance_floor)
    return config, mean, var


def _read_statistics(uri: str) -> dict[str, Tensor]:
    data = read_bytes(uri)
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{uri}: holds more than plain tensors, or is damaged; nothing in it was run; save mean and var as tensors"
        ) from e
    except DAMAGE as e:
        raise UserError(
            f"{uri}: damaged ({' '.join(str(e).split())[:100]}); copy it from the source again"
        ) from e
    _check_statistics(uri, found)
    return found


def _check_statistics(uri: str, found: object) -> None:
    """Raise UserError unless ``found`` holds a mean and a variance."""
    for name in ("mean", "var"):
        value = found.get(name) if isinstance(found, dict) else None
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(
                f"{uri}: has no tensor {name}; expected {{'mean': (d,) or (L, d), 'var': the same}}"
            )
        if not value.to(torch.float32).isfinite().all():
            raise UserError(
                f"{uri}: {name} contains NaN or Inf in float32; copy the file from the source again"
            )
        if name == "var" and (value < 0).any():
            raise UserError(f"{uri}: var holds a negative variance; copy the file from the source again")


def _by_layer(uri: str, name: str, value: Tensor, description: Description) -> Tensor:
    """One row per modelled layer (L, d), float32, of statistics (d,), (blocks, d) or (L, d), unit dimensions ignored.

    A single vector serves all layers; given one row per block of the subject, each layer takes its block's row.
    """
    d, blocks, count = description.d, description.blocks, description.condition_blocks
    rows = [size for size in value.shape[:-1] if size != 1]
    single = value.ndim == 1 or (not rows and len(blocks) == 1)
    if value.ndim == 0 or value.shape[-1] != d or (not single and rows not in ([count], [len(blocks)])):
        expected = f"({d},)" + (f", ({count}, {d})" if count else "")
        raise UserError(
            f"{uri}: {name} has shape {tuple(value.shape)}, {description.uri} asks for {expected}; correct one of them"
        )
    table = value.reshape(-1, d).to(torch.float32)
    if single:
        return table.expand(len(blocks), d).contiguous()
    return table[list(blocks)] if rows == [count] else table


def _by_block(config: PriorConfig, value: Tensor, fill: float) -> Tensor:
    """Statistics as the published loader looks them up: (d,) for one layer, else one row per block."""
    if not config.multi_layer:
        return value[0]
    table = torch.full((config.subject_layers, config.d), float(fill))
    table[glp_config.traced_blocks(config)] = value
    return table


def _smallest(uri: str, var: Tensor) -> float:
    """The smallest positive variance: as a floor it changes no other, and keeps z finite where the variance is zero."""
    positive = var[var > 0]
    if not len(positive):
        raise UserError(f"{uri}: every variance is zero; copy the file from the source again")
    return float(positive.min())


def _check_weights(uri: str, config: PriorConfig, found: dict[str, Tensor]) -> None:
    """Raise UserError unless the tensors are those of the network that ``config`` describes."""
    with torch.device("meta"):
        network = Denoiser(config.d, config.d_model, config.d_mlp, config.n_blocks, config.multi_layer)
    expected = {THEIRS + name: tuple(t.shape) for name, t in network.state_dict().items()}
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{uri}: has no tensor {missing[0]}, which {CONFIG} asks for; correct one of them")
    if unknown := sorted(set(found) - set(expected)):
        raise UserError(
            f"{uri}: has a tensor {unknown[0]} that {CONFIG} has no place for; correct one of them"
        )
    for name, shape in expected.items():
        if (got := tuple(found[name].shape)) != shape:
            raise UserError(f"{uri}: {name} has shape {got}, {CONFIG} asks for {shape}; correct one of them")
