"""``dmm import-glp``: a published prior made ours, calibrated where there are natural activations to do it on."""

from __future__ import annotations

from pydantic import Field

from dmm_ray.prior.glp_verbs import ImportGlpConfig, import_glp
from dmm_ray.training.calibrate import calibrate_prior_on_store


class ImportConfig(ImportGlpConfig):
    """Turn a published Generative Latent Prior into a prior's folder of ours."""

    activations: str | None = None
    """Activation store of the prior's language model and layer, on which its percentiles are calibrated; without it the
    prior has none."""
    calibration_rows: int = Field(default=4096, ge=1)
    """Rows of that store to calibrate on."""
    seed: int = 0
    """Of the draw of those rows."""


def import_and_calibrate(config: ImportConfig) -> str:
    """As :func:`~dmm_ray.prior.glp_verbs.import_glp`, then the percentiles. Raises UserError as they do."""
    out = import_glp(config)
    if config.activations is not None:
        calibrate_prior_on_store(out, config.activations, config.calibration_rows, config.seed)
    return out
