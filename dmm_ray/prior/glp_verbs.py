"""``dmm import-glp`` and ``dmm export-glp``: converting priors from and to the published folder format."""

from __future__ import annotations

import logging
import time
from typing import Any

from pydantic import Field, ValidationError

from dmm_ray.config import RESUMABLE, Config, refuse_other
from dmm_ray.errors import UserError
from dmm_ray.files import absolute, exists, join, read_json
from dmm_ray.prior import folder, glp
from dmm_ray.prior.config import PriorConfig
from dmm_ray.provenance import SUMMARY, write_summary

logger = logging.getLogger(__name__)
TAKEN = (folder.CONFIG, folder.WEIGHTS, glp.CONFIG, "train.json", "manifest.json")
"""Files that show that a folder is in use."""


class ImportGlpConfig(Config):
    """Convert a published Generative Latent Prior to this package's format."""

    source: str
    """Local folder, URI or Hugging Face Hub id of the published prior."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Folder to write."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the newest if not given."""


class ExportGlpConfig(Config):
    """Write a prior in the published format, for software that reads it."""

    prior: str
    """Local folder, URI or Hugging Face Hub id of the prior."""
    out: str = Field(json_schema_extra=RESUMABLE)
    """Folder to write."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the newest if not given."""


def import_glp(config: ImportGlpConfig) -> str:
    """Read a published prior and write it in our format, tensors bit for bit; returns the folder.

    Raises:
        UserError: not a published prior, a damaged or inconsistent file, or ``out`` holds something else.
    """
    started = time.perf_counter()
    out = _claim(config.out, config)
    path = folder.resolve(config.source, config.revision)
    if not exists(join(path, glp.CONFIG)):
        raise UserError(f"{config.source}: no {glp.CONFIG} here; `import-glp` reads published priors only")
    prior, tensors = glp.load(path)
    folder.save(out, prior, tensors)
    return _finish(out, config, prior, {"weights": glp.weights_name(path)}, started)


def export_glp(config: ExportGlpConfig) -> str:
    """Read a prior and write it in the published format; returns the folder.

    Raises:
        UserError: not a prior, one that the format cannot represent, or ``out`` holds something else.
    """
    started = time.perf_counter()
    out = _claim(config.out, config)
    prior, tensors = folder.load(config.prior, config.revision)
    glp.save(out, prior, tensors)
    return _finish(out, config, prior, {}, started)


def _claim(out: str, config: Config) -> str:
    """``out`` as an absolute path. Raises UserError if it holds what another command wrote."""
    out = absolute(out)
    used = next((name for name in TAKEN if exists(join(out, name))), None)
    if used is None:
        return out
    summary = read_json(join(out, SUMMARY)) if exists(join(out, SUMMARY)) else {}
    try:
        saved = type(config).model_validate(summary.get("inputs", {}).get("config"))
    except ValidationError as e:  # written by another command
        raise UserError(f"out: {out} holds another {used}; choose another folder") from e
    refuse_other(out, saved.identity(), config.identity())
    return out


def _finish(out: str, config: Config, prior: PriorConfig, inputs: dict[str, Any], started: float) -> str:
    figures = {"d": prior.d, "layers": list(prior.layers), "n_blocks": prior.n_blocks}
    inputs = {"config": config.model_dump(mode="json"), **inputs}
    write_summary(out, {"figures": figures}, inputs, time.perf_counter() - started)
    logger.info("%s: d %d, layers %s", out, prior.d, ", ".join(map(str, prior.layers)))
    return out
