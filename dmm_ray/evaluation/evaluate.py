"""``dmm evaluate``: compare a prior with classical baselines on the test documents."""

from __future__ import annotations

import logging
import time

from dmm_ray.errors import UserError
from dmm_ray.evaluation import plots
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import load
from dmm_ray.evaluation.methods import fit
from dmm_ray.evaluation.report import write_report
from dmm_ray.evaluation.stages import STAGES, Figures
from dmm_ray.evaluation.summary import finite, sources, summarize, training_curve
from dmm_ray.files import absolute, exists, join, make_folder, write_json
from dmm_ray.provenance import SUMMARY, with_provenance

__all__ = ["EvaluateConfig", "evaluate"]
logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> str:
    """Fit the baselines, measure all methods on test documents, write plots, ``report.html`` and ``summary.json``.

    Returns the output folder.

    Raises:
        UserError: the inputs do not belong together or are damaged, or the output folder holds a store or a prior.
    """
    start = time.perf_counter()
    out = absolute(config.out)
    for name, what in (("manifest.json", "an activation store"), ("config.json", "a prior")):
        if exists(join(out, name)):
            raise UserError(f"out: {out} holds {what}; choose another folder")
    inputs = load(config)
    make_folder(out)
    logger.info(
        "%d training and %d test rows read in %.1f s", len(inputs.train.z), len(inputs.test.z), _since(start)
    )
    seconds = {"load": _since(start)}
    methods = fit(config, inputs)
    seconds["fit"] = _since(start) - seconds["load"]
    tables: dict[str, Figures] = {}
    for name, stage in STAGES.items():
        begin = time.perf_counter()
        tables[name] = stage(config, inputs, methods)
        seconds[name] = _since(begin)
        logger.info("%s measured in %.1f s", name.replace("_", " "), seconds[name])
    results = summarize(config, inputs, methods, tables)
    results["seconds_by_stage"] = {k: round(v, 2) for k, v in seconds.items()}
    summary = with_provenance(finite(results), sources(config, inputs), _since(start))
    drawn = tables["samples"].pop("rows")
    plots.save_all(out, summary, inputs.test.z, drawn, training_curve(config.prior))
    write_report(out, summary)
    write_json(join(out, SUMMARY), summary)
    return out


def _since(start: float) -> float:
    return time.perf_counter() - start
