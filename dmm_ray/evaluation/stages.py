"""The measurement stages of an evaluation, each of which returns a table."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dmm_ray.evaluation import fidelity, likelihood, lm, samples
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import EvaluationInputs
from dmm_ray.evaluation.fidelity import FlowLoss
from dmm_ray.evaluation.methods import SAE_VARIANTS, Methods, subset
from dmm_ray.evaluation.statistics import Estimate, clustered

logger = logging.getLogger(__name__)
HEADLINE_LEVEL = 0.5
Figures = dict[str, Any]


def noise_seeds(config: EvaluateConfig) -> range:
    """The seeds of the draws of the noise."""
    return range(config.seed, config.seed + config.noise_seeds)


def measure_flow(config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods) -> Figures:
    """Flow-matching losses on all test rows, and on those with unseen prefixes."""
    draws = [fidelity.NoisedRows.assign(len(inputs.test.z), seed) for seed in noise_seeds(config)]
    errors = [fidelity.squared_errors(methods.denoisers, inputs.test, noised) for noised in draws]
    docs, unseen = inputs.test.docs, inputs.is_unseen(inputs.test.ids)

    def table(mask: np.ndarray | None) -> dict[str, FlowLoss]:
        return {
            name: fidelity.summarize([(n, e[name]) for n, e in zip(draws, errors, strict=True)], docs, mask)
            for name in methods.denoisers
        }

    found: Figures = {"all": table(None), "unseen": None}
    if unseen is not None:
        found["unseen"] = table(unseen)
        found["unseen_share"] = float(unseen.mean())
    for losses in (found["all"], found["unseen"] or {}):
        if losses:
            losses["sae"] = min((losses[name] for name in SAE_VARIANTS), key=_loss)
    return found


def measure_lm(config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods) -> Figures:
    """Delta LM losses by level and method, for all tokens and for those after a row with an unseen prefix.

    Empty for an encoder, which predicts no next token.
    """
    if inputs.subject.bidirectional:
        logger.info(
            "delta LM loss: skipped, %s is an encoder and predicts no next token", inputs.subject.model_id
        )
        return {}
    documents = lm.Documents(
        inputs.subject, inputs.layer, lm.draw(inputs.tokens, config.lm_documents, config.seed)
    )
    if not documents.tokens:
        return {}
    rows, base = documents.capture(), documents.losses()
    unseen, docs = inputs.is_unseen(documents.ids), documents.ids[:, 0].numpy()
    scored = ~np.isnan(base)

    def deltas(restored: Sequence[torch.Tensor]) -> Figures:
        delta = documents.deltas(restored, base)
        kept = {"all": scored} | ({} if unseen is None else {"unseen": scored & unseen})
        return {key: clustered(delta[mask], docs[mask]) for key, mask in kept.items()}

    levels = sorted({HEADLINE_LEVEL, *config.lm_levels})
    found: Figures = {"levels": {}, "lm_loss": clustered(base[scored], docs[scored])}
    for u in levels:
        seeds = noise_seeds(config) if u == HEADLINE_LEVEL else [config.seed]
        draws = [lm.restorations(inputs, methods, rows, documents.ids, u, seed) for seed in seeds]
        table = {}
        for restored in zip(*draws, strict=True):
            table[restored[0][0]] = deltas([x for _, x in restored])
        table["sae"] = {
            part: _least(*(table[name][part] for name in SAE_VARIANTS)) for part in table["gaussian"]
        }
        found["levels"][u] = table
    denoised = [lm.sampled(inputs, rows, documents.ids, HEADLINE_LEVEL, seed) for seed in noise_seeds(config)]
    found["levels"][HEADLINE_LEVEL]["prior"] = deltas(denoised)
    found["plain"] = {name: deltas([x]) for name, x in lm.plain(inputs, methods, rows)}
    found["tokens"], found["documents"] = int(scored.sum()), len(documents.tokens)
    return found


def measure_nll(config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods) -> Figures:
    """Negative log-likelihoods in nats per dimension of raw rows."""
    if not config.nll_rows:
        return {}
    part = subset(inputs.test, config.nll_rows)
    unseen, docs = inputs.is_unseen(part.ids), part.docs
    found = likelihood.nll(config, inputs, methods, part)
    tables: Figures = {"all": {k: clustered(v, docs) for k, v in found.items()}}
    if unseen is not None:
        tables["unseen"] = {k: clustered(v[unseen], docs[unseen]) for k, v in found.items()}
    return tables


def measure_samples(config: EvaluateConfig, inputs: EvaluationInputs, methods: Methods) -> Figures:
    """Frechet distance to the test rows and two-sample AUC, of every method's samples and (``floor``) training rows."""
    if not config.samples:
        return {"rows": {}, "frechet": {}, "auc": {}}
    drawn = samples.draw(config, inputs, methods)
    test, docs = inputs.test.z, inputs.test.docs
    auc = {
        k: samples.two_sample_auc(test, docs, x, config.two_sample_rows, config.seed)
        for k, x in drawn.items()
    }
    return {
        "rows": drawn,
        "frechet": {k: samples.frechet_distance(x, test) for k, x in drawn.items()},
        "auc": auc,
    }


def _loss(entry: FlowLoss) -> float:
    return entry.overall.mean if entry.overall else math.inf


def _least(*estimates: Estimate | None) -> Estimate | None:
    return min((e for e in estimates if e is not None), key=lambda e: e.mean, default=None)


STAGES = {"flow": measure_flow, "lm": measure_lm, "nll": measure_nll, "samples": measure_samples}
