"""An extraction as a job of units: its actors, time estimate and limit on failed documents."""

from __future__ import annotations

import logging
from typing import Any

from dmm_ray.errors import UserError
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.engine import ExtractionTask, Extractor, Loading
from dmm_ray.extraction.plan import ExtractionPlan, calibrate, worth_calibrating
from dmm_ray.ray_session import call_on_workers, cluster_address
from dmm_ray.text.corpus import Corpus
from dmm_ray.units.actor import UnitActor
from dmm_ray.units.job import Job
from dmm_ray.units.resources import Resources
from dmm_ray.units.resume import finish

logger = logging.getLogger(__name__)
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Extraction(Job[ExtractConfig]):
    """Extraction of activations from text.

    Args:
        config: the configuration of `dmm extract`.
        out: the store's folder; an absolute path or URI.
        plan: the expected contents.
        corpus: the text.
    """

    def __init__(self, config: ExtractConfig, out: str, plan: ExtractionPlan, corpus: Corpus) -> None:
        super().__init__(out, plan.manifest, config.pool, config)
        self.plan, self.corpus = plan, corpus

    def actor(self, resources: Resources, units: int) -> tuple[type[UnitActor], tuple[Any, ...]]:
        """Actors that each hold an engine with the truncated model."""
        config, manifest = self.config, self.manifest
        loading = Loading(
            batch_tokens=config.batch_tokens or BATCH_TOKENS[resources.device],
            threads=max(1, int(resources.cpus)),
            device=resources.device,
            trust_remote_code=config.subject.trust_remote_code,
            device_map=config.subject.device_map,
            max_memory=config.subject.max_memory,
            offload_folder=config.subject.offload_folder,
        )
        logger.info(
            "extracting %d units of up to %d documents, layers %s, on %d actors (%s)%s",
            units, manifest.documents_per_unit, list(manifest.layers), resources.actors, resources.device,
            expected_time(self.plan, loading, resources, units),
        )  # fmt: skip
        return Extractor, (
            ExtractionTask(self.out, manifest, config.max_failed_documents, loading),
            self.corpus,
        )

    def add(self, result: dict[str, Any]) -> None:
        """Raises UserError if more documents failed, over all units, than may be skipped."""
        super().add(result)
        if self.failed > self.config.max_failed_documents:
            raise UserError(
                f"text: {self.failed} documents failed, the last: {result['failure']}; "
                f"skip more with --max-failed-documents (now {self.config.max_failed_documents})"
            )

    def finish(self) -> dict[str, Any]:
        """Write the moments of the complete corpus."""
        return finish(self.out, self.manifest)


def expected_time(plan: ExtractionPlan, loading: Loading, resources: Resources, todo: int) -> str:
    """The estimated time for the remaining units, from a short calibration; empty if the job is not much longer."""
    if not worth_calibrating(plan.sample, loading.batch_tokens):
        return ""
    if resources.gpus or cluster_address():
        arguments = (plan.manifest, loading, plan.sample.pieces)
        [rate] = call_on_workers(1, calibrate, *arguments, cpus=resources.cpus, gpus=resources.gpus)
    else:
        rate = calibrate(plan.manifest, loading, plan.sample.pieces)
    seconds = plan.sample.tokens * todo / plan.manifest.units / (rate * resources.actors)
    return f"; about {_duration(seconds)} at {rate:,.0f} tokens/s per actor, from a short calibration"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
