"""``dmm import-glp``: convert a published prior and calibrate it if natural activations are given."""

from __future__ import annotations

from pydantic import Field

from dmm_ray.prior.glp_verbs import ImportGlpConfig, import_glp
from dmm_ray.training.calibrate import calibrate_prior_on_store


class ImportConfig(ImportGlpConfig):
    """Convert a published Generative Latent Prior to this package's format."""

    activations: str | None = None
    """Activation store of the prior's language model and layer to calibrate percentiles on; without it the prior has
    none."""
    calibration_rows: int = Field(default=4096, ge=1)
    """Rows of that store to calibrate on."""
    seed: int = 0
    """Seed for drawing those rows."""


def import_and_calibrate(config: ImportConfig) -> str:
    """Call :func:`~dmm_ray.prior.glp_verbs.import_glp`, then calibrate. Raises UserError as they do."""
    out = import_glp(config)
    if config.activations is not None:
        calibrate_prior_on_store(out, config.activations, config.calibration_rows, config.seed)
    return out
