"""``config.yaml`` of a published Generative Latent Prior: read into a :class:`PriorConfig`, and written from one.

There a layer is the block whose input or output was traced (``retain``); here the input of block k is layer k - 1. The
layer condition stays as the network was trained: the block's number over (number of blocks - 1).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml
from pydantic import ValidationError

from dmm_ray.config import one_line
from dmm_ray.errors import UserError
from dmm_ray.files import write_bytes
from dmm_ray.prior.config import PriorConfig
from dmm_ray.prior.references import Settings

DENOISER, TRACED = "glp_kwargs.denoiser_config", "glp_kwargs.tracedict_config"
NORMALIZER = "glp_kwargs.normalizer_config"
KNOWN = {
    DENOISER: {"d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers"},
    NORMALIZER: {"rep_statistic", "d_input"},
}
"""Keys that determine what is computed; any other key would mean a different model."""
OUR_SECTION = "dmm_ray"
"""Section that :func:`write` adds for fields that the published format lacks; its readers ignore it."""
OUR_FIELDS = ("subject_layers", "variance_floor", "subject", "split", "training")
HOOKS = ("output", "input")
"""``retain``, indexed by our ``depth_offset``."""


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of a ``config.yaml``."""

    uri: str
    d: int
    d_model: int
    d_mlp: int
    n_blocks: int
    blocks: tuple[int, ...]
    """The traced blocks of the subject, by number."""
    condition_blocks: int | None
    """Number of blocks of the subject; None without a layer condition."""
    offset: int
    """1 if the blocks' inputs were traced, 0 for outputs."""
    subject: dict[str, Any]
    ours: dict[str, Any]
    """Fields beyond the published format, present in folders that we exported."""

    def prior_config(self, floor: float) -> PriorConfig:
        """Convert it to a prior's configuration with variance floor ``floor``.

        Raises:
            UserError: a value that is invalid for a prior.
        """
        fields = {
            "d": self.d,
            "layers": [block - self.offset for block in self.blocks],
            "depth_offset": self.offset,
            "layer_conditioned": self.condition_blocks is not None and len(self.blocks) == 1,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "n_blocks": self.n_blocks,
            "variance_floor": floor,
            "subject": self.subject,
        }
        condition = {"subject_layers": self.condition_blocks} if self.condition_blocks else {}
        try:
            return PriorConfig.model_validate(fields | self.ours | condition)
        except ValidationError as e:
            raise UserError(f"{self.uri}: {one_line(e)}; correct it there") from e


def read(uri: str) -> Description:
    """Read a ``config.yaml``.

    Raises:
        UserError: the file is missing, not YAML, or of another architecture, or a key is missing or of the wrong type.
    """
    settings = Settings(uri)
    for section, known in KNOWN.items():
        if unknown := sorted(settings.keys(section) - known):
            raise UserError(
                f"{uri}: {section}.{unknown[0]} is not in the published architecture; remove it if it changes nothing"
            )
    retain = settings.get(f"{TRACED}.retain")
    if retain not in HOOKS:
        raise UserError(f"{uri}: {TRACED}.retain must be 'input' or 'output' (got {retain!r}); correct it")
    blocks, prefix = _blocks(settings)
    ours = settings.find(OUR_SECTION) or {}
    if not isinstance(ours, dict) or set(ours) - set(OUR_FIELDS):
        raise UserError(f"{uri}: {OUR_SECTION} may only contain {', '.join(OUR_FIELDS)}; remove the section")
    return Description(
        uri=uri,
        d=_size(settings, f"{DENOISER}.d_input"),
        d_model=_size(settings, f"{DENOISER}.d_model"),
        d_mlp=_size(settings, f"{DENOISER}.d_mlp"),
        n_blocks=_size(settings, f"{DENOISER}.n_layers"),
        blocks=blocks,
        condition_blocks=_condition_blocks(settings, blocks),
        offset=HOOKS.index(retain),
        subject={k: v for k, v in (("id", settings.find("model_name")), ("block_path", prefix)) if v},
        ours=ours,
    )


def write(uri: str, config: PriorConfig) -> None:
    """Write ``config.yaml``.

    Its only reference is to the normaliser's file, which the published loader sets at the top level.

    Raises:
        UserError: the published format cannot represent the prior.
    """
    blocks = traced_blocks(config)
    value = {
        "model_name": _escaped(config.subject.get("id") or ""),
        "rep_statistic": "rep_statistics.pt",
        "glp_kwargs": {
            "normalizer_config": {"rep_statistic": "${rep_statistic}"},
            "denoiser_config": {
                "d_input": config.d,
                "d_model": config.d_model,
                "d_mlp": config.d_mlp,
                "n_layers": config.n_blocks,
                "multi_layer_n_layers": config.subject_layers if config.multi_layer else None,
            },
            "tracedict_config": {
                "layer_prefix": config.subject.get("block_path") or "model.layers",
                "layers": blocks,
                "retain": HOOKS[config.depth_offset],
            },
        },
        OUR_SECTION: _escaped({name: config.model_dump(mode="json")[name] for name in OUR_FIELDS}),
    }
    write_bytes(uri, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())


def traced_blocks(config: PriorConfig) -> list[int]:
    """The blocks whose inputs or outputs a prior models. Raises UserError if their numbers are out of range."""
    blocks = [layer + config.depth_offset for layer in config.layers]
    if min(blocks) < 0 or (config.multi_layer and max(blocks) >= config.subject_layers):
        raise UserError(
            f"layers: blocks {', '.join(map(str, blocks))} of {config.subject_layers} cannot be exported; "
            "correct layers, subject_layers or depth_offset in config.json"
        )
    return blocks


def _size(settings: Settings, key: str) -> int:
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{settings.uri}: {key} must be a positive integer (got {value!r}); correct it")
    return value


def _blocks(settings: Settings) -> tuple[tuple[int, ...], str | None]:
    """The traced blocks, and the prefix of their numbers in the subject's module names."""
    key = f"{TRACED}.layers"
    value, prefix = settings.get(key), settings.find(f"{TRACED}.layer_prefix")
    names = [str(v) for v in value if type(v) in (int, str)] if isinstance(value, list) else []
    matches = [m for name in names if (m := re.fullmatch(r"(?:(.+)\.)?(\d+)", name))]
    if not matches or len(matches) < len(value):
        raise UserError(f"{settings.uri}: {key} must be a list of block numbers (got {value!r}); correct it")
    blocks = tuple(int(m[2]) for m in matches)
    if len(set(blocks)) < len(blocks):
        raise UserError(f"{settings.uri}: {key} names a block twice (got {value!r}); correct it")
    return blocks, prefix or matches[0][1]


def _condition_blocks(settings: Settings, blocks: tuple[int, ...]) -> int | None:
    key = f"{DENOISER}.multi_layer_n_layers"
    if settings.find(key) is None:
        if len(blocks) > 1:
            raise UserError(
                f"{settings.uri}: {TRACED}.layers has {len(blocks)} blocks, but {key} is not given; "
                "add the number of blocks of the language model"
            )
        return None
    count = _size(settings, key)
    if max(blocks) >= count:
        raise UserError(
            f"{settings.uri}: {TRACED}.layers has block {max(blocks)}, but {key} is {count}; correct one"
        )
    return count


def _escaped(value: Any) -> Any:
    """``value`` with everything that would be read as a reference escaped."""
    if isinstance(value, dict):
        return {key: _escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child) for child in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
