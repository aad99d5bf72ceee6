"""Building ``summary.json`` from the tables of measurements."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from dmm_ray.evaluation import likelihood
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs
from dmm_ray.evaluation.methods import PRETRAINED_SAE, Methods
from dmm_ray.evaluation.stages import HEADLINE_LEVEL, Figures
from dmm_ray.evaluation.statistics import Estimate, Ratio, relative
from dmm_ray.files import absolute, exists, join, read_bytes, read_json
from dmm_ray.provenance import SUMMARY
from dmm_ray.training.config import TrainConfig
from dmm_ray.training.run_folder import RUN

DELTA_LM_RIVALS = ("gaussian", "pca", "sae", PRETRAINED_SAE)
MIXTURES = ("mixture", "factor_analysers")
UNKNOWN_UNSEEN: Figures = {"relative_unseen_prefix": None, "relative_interval_unseen_prefix": None}
Estimates = dict[str, dict[str, Estimate | None]]
"""Metrics by name and method."""


def summarize(
    config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods, tables: dict[str, Figures]
) -> Figures:
    """The results, for ``summary.json``."""
    log_det = likelihood.log_determinant_per_dim(inputs)
    everywhere, unseen = (_estimates(tables, methods, rows) for rows in ("all", "unseen"))
    fidelity_all = _means(everywhere)
    sampled = tables["samples"]
    for name, key in (("frechet_distance", "frechet"), ("two_sample_auc", "auc")):
        fidelity_all[name] = {k: sampled[key].get(k) for k in (*methods.keys, "floor")}
    return {
        "fidelity": fidelity_all,
        "stderr": _stderrs(everywhere),
        **_against_rivals(everywhere, ""),
        **(_against_rivals(unseen, "_unseen_prefix") if inputs.unseen is not None else UNKNOWN_UNSEEN),
        "fidelity_unseen_prefix": _means(unseen) if inputs.unseen is not None else None,
        "stderr_unseen_prefix": _stderrs(unseen) if inputs.unseen is not None else None,
        "by_level": {k: v.by_decile for k, v in tables["flow"]["all"].items()},
        "delta_lm": _delta_lm(tables["lm"]),
        "nll_normalised_nats_per_dim": {
            k: None if v is None else v + log_det for k, v in fidelity_all["nll_nats_per_dim"].items()
        },
        "methods": about(config, methods),
        "rows": {
            "train": len(inputs.train.z),
            "validation": len(inputs.validation.z),
            "test": len(inputs.test.z),
            "test_documents": len(np.unique(inputs.test.docs)),
            "unseen_prefix_share": tables["flow"].get("unseen_share"),
            "nll": min(config.nll_rows, len(inputs.test.z)),
            "lm_tokens": tables["lm"].get("tokens", 0),
            "lm_documents": tables["lm"].get("documents", 0),
            "samples": config.samples,
        },
        "training": training(config.prior),
    }


def sources(config: EvaluateConfig, inputs: EvaluationInputs) -> Figures:
    """The inputs of an evaluation, for ``summary.json``."""
    return {
        "prior": absolute(config.prior) if exists(config.prior) else config.prior,
        "activations": inputs.store.uri,
        "model": inputs.subject.model_id,
        "layer": inputs.layer,
        "d": inputs.prior.d,
        "precision": inputs.prior.precision,
        "compute_dtype": inputs.compute_dtype,
        "weights_hash": inputs.subject.weights_hash,
        "store": inputs.store.manifest.config_hash,
        "split": inputs.prior.config.split,
        "config": config.model_dump(mode="json"),
    }


def compare(estimates: Estimates) -> dict[str, Ratio | None]:
    """The prior's losses relative to those of its rivals, by name; None where either is missing."""
    flow, delta = estimates["flow_matching_loss"], estimates["delta_lm_loss"]
    rivals = [found for k in DELTA_LM_RIVALS if (found := delta.get(k)) is not None]
    best = min(rivals, key=lambda found: found.mean, default=None)
    return {
        **{f"flow_matching_loss_vs_{k}": relative(flow["prior"], flow[k]) for k in flow if k != "prior"},
        "delta_lm_loss_vs_best_of_gaussian_pca_sae": relative(delta["prior"], best),
        **{f"delta_lm_loss_vs_{k}": relative(delta["prior"], delta[k]) for k in MIXTURES},
    }


def training_curve(prior: str) -> list[Figures]:
    """The records of the prior's ``stats.jsonl``; empty for a prior without one."""
    path = join(absolute(prior), "stats.jsonl")
    return [json.loads(line) for line in read_bytes(path).splitlines()] if exists(path) else []


def training(prior: str) -> Figures | None:
    """Training samples of a prior, the time budget they were chosen for, and its validation loss halfway through the
    run and at its end; None unless `dmm train` wrote the prior."""
    marker, records = join(absolute(prior), RUN), training_curve(prior)
    if not exists(marker) or not records:
        return None
    schedule = TrainConfig.nest(read_json(marker)["train"]).get("schedule", {})
    known = [r for r in records if r["validation_loss"] is not None]
    half = [r["validation_loss"] for r in known if r["samples"] <= 0.55 * records[-1]["samples"]]
    return {
        "samples": records[-1]["samples"],
        "minutes": schedule.get("minutes"),
        "half": half[-1] if half else None,
        "end": known[-1]["validation_loss"] if known else None,
    }


def about(config: EvaluateConfig, methods: Methods) -> Figures:
    """Size and fitting seconds by method; the prior's seconds are read from the summary in its folder, if any."""
    found: Figures = dict(methods.about())
    path = join(absolute(config.prior), SUMMARY)
    trained = read_json(path).get("seconds") if exists(path) else None
    found["prior"] |= {"seconds": trained, "samples": methods.prior.prior.config.training.get("samples")}
    return found


def finite(value: Any) -> Any:
    """``value`` with NaN and Inf replaced by None, since JSON cannot represent them."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimates(tables: dict[str, Figures], methods: Methods, rows: str) -> Estimates:
    """The metrics on ``rows`` ("all" or "unseen"), by name and method."""
    flow = tables["flow"][rows] or {}
    delta = tables["lm"].get("levels", {}).get(HEADLINE_LEVEL, {})
    nll = tables["nll"].get(rows, {})
    return {
        "flow_matching_loss": {k: flow[k].overall if k in flow else None for k in methods.keys},
        "delta_lm_loss": {k: delta.get(k, {}).get(rows) for k in methods.keys},
        "nll_nats_per_dim": {k: nll.get(k) for k in ("prior", *methods.densities)},
    }


def _means(estimates: Estimates) -> Figures:
    return {name: {k: e and e.mean for k, e in row.items()} for name, row in estimates.items()}


def _stderrs(estimates: Estimates) -> Figures:
    return {name: {k: e and e.stderr for k, e in row.items()} for name, row in estimates.items()}


def _against_rivals(estimates: Estimates, suffix: str) -> Figures:
    found = compare(estimates)
    return {
        f"relative{suffix}": {k: ratio and ratio.value for k, ratio in found.items()},
        f"relative_interval{suffix}": {k: ratio and ratio.interval for k, ratio in found.items()},
    }


def _delta_lm(table: Figures) -> Figures | None:
    if not table:
        return None

    def means(methods: Figures, rows: str) -> Figures:
        return {name: entry[rows].mean for name, entry in methods.items() if entry.get(rows)}

    levels = {f"{u:g}": v for u, v in table["levels"].items()}
    prior_sample = table["levels"][HEADLINE_LEVEL]["prior"]
    return {
        "lm_loss": table["lm_loss"].mean,
        "by_level": {u: means(v, "all") for u, v in levels.items()},
        "by_level_unseen_prefix": {u: means(v, "unseen") for u, v in levels.items()},
        "published_protocol": means(table["plain"] | {"prior": prior_sample}, "all"),
    }
