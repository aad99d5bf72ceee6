"""``dmm demo``: the full pipeline on one machine, text -> activations -> prior -> report -> endpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from pydantic import Field

from dmm_ray.config import Config
from dmm_ray.demo.steps import Steps
from dmm_ray.demo.stories import write_corpus
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.evaluation.evaluate import EvaluateConfig, evaluate
from dmm_ray.evaluation.report import ScoredText, ScoredToken, write_report
from dmm_ray.extraction.config import ExtractConfig, ExtractedModel
from dmm_ray.extraction.extract import extract
from dmm_ray.files import absolute, exists, join, make_folder, read_json
from dmm_ray.prior.base import BaseKind
from dmm_ray.provenance import SUMMARY, write_summary
from dmm_ray.seeds import torch_rng
from dmm_ray.serving.config import ServeConfig
from dmm_ray.serving.serve import running
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import TEST, Split
from dmm_ray.subject import SubjectModel, SubjectSource
from dmm_ray.text.corpus import Corpus
from dmm_ray.training.config import BaseConfig, OptimizerConfig, ScheduleConfig, TrainConfig, ValidationConfig
from dmm_ray.training.run_folder import saved_run
from dmm_ray.training.train import train

logger = logging.getLogger(__name__)
SUBJECT = Path(__file__).parent / "subject"
SHOWN_TOKENS = 120
MINUTES = 4.9
LEAST_SHARE = 0.3
"""Minimum share of the total time that training gets."""
TRAIN_OVERHEAD_S = 65.0
"""Seconds that training takes in addition to its steps: the base, the trial, Ray Train's start and end, the
calibration."""
BASE_SIZE = 2048
CALIBRATION_ROWS = 2048
EVALUATION: dict[str, object] = {"quick": True}
"""Fields of `dmm evaluate`; searching for the baselines' sizes would take minutes."""


class DemoConfig(Config):
    """Run the full pipeline: text, activations, prior, comparison with baselines, briefly serving, an HTML report."""

    out: str = "runs/demo"
    """Output folder; finished steps in it are kept when the command is run again."""
    model: str | None = None
    """Language model: a folder, a .gguf file or a hub id; defaults to the small one inside the package."""
    text: str | list[str] | None = None
    """Text files, folders or URIs; defaults to stories from the package's generator."""
    layer: int | None = Field(default=None, ge=0)
    """Layer to model; defaults to the middle one."""
    documents: int = Field(default=3000, ge=100)
    """Stories to generate if no text is given."""
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Approximate total time; training gets what the other steps leave. Defaults to 4.9; a resumed run keeps its
    number of samples."""
    samples: int | None = Field(default=None, ge=1)
    """Training samples, instead of a time."""
    batch: int = Field(default=1024, ge=1)
    """Samples per training batch."""
    base: BaseKind = "mixture"
    """What the network corrects, as in `dmm train`; a mixture is of 2,048 Gaussians, fewer on few rows."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; defaults to one chosen for the network's width."""
    window: int | None = Field(default=None, ge=2)
    """Tokens to use per document; defaults to the model's context window, at most 2048."""
    evaluation: dict[str, object] = Field(default={})
    """Fields of `dmm evaluate` to override."""
    seed: int = 0
    """Seed of the stories, the training and the evaluation."""


def demo(config: DemoConfig) -> str:
    """Run the pipeline and return the path of the HTML report.

    Raises:
        UserError: bad input to any step; the message names it.
    """
    started = time.perf_counter()
    if config.samples is not None and config.minutes is not None:
        raise UserError("minutes: excludes samples; give --samples or --minutes, not both")
    out = absolute(config.out)
    make_folder(out)
    model = config.model or str(SUBJECT)
    layer = _layer(config, model)
    with Steps(None if config.samples else config.minutes or MINUTES) as steps:
        path, summary = _run(config, steps, out, model, layer)
    results = {
        name: value for name, value in summary.items() if name not in ("inputs", "versions", "seconds")
    }
    write_summary(out, results, summary["inputs"], time.perf_counter() - started)
    logger.info("done in %.0f s", time.perf_counter() - started)
    return path


def _run(config: DemoConfig, steps: Steps, out: str, model: str, layer: int) -> tuple[str, dict[str, Any]]:
    """Run every step and return the report's path and the summary."""
    steps.begin("extract")
    store = extract(
        ExtractConfig(
            subject=ExtractedModel(model=model),
            text=config.text or _stories(config, out),
            layers=[layer],
            window=config.window,
            rows_per_shard=1 << 16,
            out=join(out, "activations"),
        )
    )
    steps.begin("train")
    prior = train(
        TrainConfig(
            activations=store,
            out=join(out, "prior"),
            schedule=ScheduleConfig(
                samples=config.samples,
                minutes=_training_minutes(config, steps, join(out, "prior")),
                batch=config.batch,
            ),
            analytic=BaseConfig(base=config.base, base_sizes=(BASE_SIZE,)),
            optimizer=OptimizerConfig(lr=config.lr),
            validation=ValidationConfig(calibration_rows=CALIBRATION_ROWS),
            seed=config.seed,
        )
    )
    steps.begin("evaluate")
    fields = {"seed": config.seed, **EVALUATION, **config.evaluation}
    report = evaluate(
        EvaluateConfig.model_validate(
            {"prior": prior, "activations": store, "model": model, "out": join(out, "report"), **fields}
        )
    )
    summary = read_json(join(report, SUMMARY))
    steps.begin("serve")
    path = write_report(report, summary, scored=_score(config, prior, store, model, layer))
    figures = {"report": path, "headline": summary["fidelity"], "layer": layer}
    return path, summary | {"figures": figures}


def _training_minutes(config: DemoConfig, steps: Steps, prior: str) -> float | None:
    """The time for training, taken from the run in its folder if there is one; None if ``samples`` is given."""
    if config.samples is not None:
        return None
    saved = saved_run(prior)
    if saved is not None and saved.config.schedule.minutes is not None:
        return saved.config.schedule.minutes
    left = steps.left_for("train") - TRAIN_OVERHEAD_S
    return round(max(LEAST_SHARE * steps.total_s, left) / 60, 2)


def _layer(config: DemoConfig, model: str) -> int:
    """The requested layer, or the middle one (7 of 16 blocks, 15 of 32, as published)."""
    if config.layer is not None:
        return config.layer
    return (SubjectSource.resolve(model).check([0]) - 1) // 2


def _stories(config: DemoConfig, out: str) -> str:
    """The path of the generated text, which is written if missing."""
    path = join(out, f"stories-{config.documents}-{config.seed + 1}.jsonl")
    if not exists(path):
        write_corpus(path, config.documents, seed=config.seed + 1)
    return path


def _score(config: DemoConfig, prior: str, store_uri: str, model: str, layer: int) -> list[ScoredText]:
    """Two texts scored token by token over HTTP: a test document, and the same document with its words shuffled."""
    subject = SubjectModel.from_pretrained(model, layers=[layer])
    text = _test_text(store_uri, prior)
    words = text.split()
    order = torch.randperm(len(words), generator=torch_rng(config.seed)).tolist()
    with running(ServeConfig(prior=(prior,), port=0, auth="none")) as url:
        return [
            ScoredText(title, _score_text(subject, one, layer, url))
            for title, one in (
                ("A test document", text),
                ("The same words, shuffled", " ".join(words[i] for i in order)),
            )
        ]


def _test_text(store_uri: str, prior: str) -> str:
    """The first test document of at least 30 words, or the longest of the first 100."""
    split = Split.model_validate(read_json(join(prior, "config.json"))["split"])
    entry = ActivationStore.open(store_uri).manifest.text
    corpus = Corpus.scan(entry.uris, entry.text_field, entry.separator)
    longest = ""
    for document in corpus.read(0, corpus.n_documents):
        if document.text and split.of(np.array([document.doc]))[0] == TEST:
            longest = max(longest, document.text, key=len)
            if len(longest.split()) >= 30:
                return longest
    if not longest.strip():
        raise UserError(f"{store_uri}: no test document contains text; give more text with --text")
    return longest


def _score_text(subject: SubjectModel, text: str, layer: int, url: str) -> list[ScoredToken]:
    """Every token of a text with the log-probability of its activation, from the endpoint at ``url``."""
    ids = subject.tokenize([text], SHOWN_TOKENS)
    with torch.inference_mode():
        states = subject.capture(*subject.pad(ids), [layer])[layer][0, 1:]
    body = {"activations": states.float().tolist(), "layer": layer, "probes": 4}
    answer = httpx.post(f"{url}/v1/log_prob", json=body, timeout=120)
    if answer.status_code != 200:
        raise CheckFailed(f"{url}/v1/log_prob answered {answer.status_code}: {answer.text[:200]}")
    scores = [None, *answer.json()["nats_per_dim"]]
    return [
        ScoredToken(subject.tokenizer.decode([i]), score) for i, score in zip(ids[0], scores, strict=True)
    ]
