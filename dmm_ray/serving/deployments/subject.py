"""The deployment of a language model: reads texts, generates, and finds the tokens nearest to activations.

It holds its own copy of every prior of the language model's activations, for projections between two tokens, so it
needs memory for the language model and those priors. Log-probabilities are left to the priors' own deployments.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from ray import serve

from dmm_ray.errors import UserError
from dmm_ray.precision import PrecisionOption, precision_on
from dmm_ray.serving.errors import RequestError
from dmm_ray.serving.text_schemas import (
    DirectionInfo,
    Ended,
    GenerateBody,
    NearToken,
    SubjectInfo,
    TextRows,
    TokenEvent,
    TokenScore,
)

if TYPE_CHECKING:
    from dmm_ray.interventions import Direction
    from dmm_ray.prior import ActivationPrior
    from dmm_ray.subject import Generation, Intervention

logger = logging.getLogger("ray.serve.dmm")
T = TypeVar("T")
REQUEST_DIRECTION = "of this request"


@serve.deployment
class SubjectDeployment:
    """Answers the text routes' calls, one forward pass at a time.

    Args:
        model: the language model's folder, GGUF file or hub id.
        directions: folder of steering directions, if any.
        priors: folder or hub id of each prior by name, the default one first.
        device: device of the computation, ``cpu`` or ``cuda``.
        formats: precision of the priors' products, and dtype of the language model's computation.
        threads: CPU threads of torch.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: one of them cannot be loaded, or the default prior or a direction does not fit the model.
    """

    def __init__(
        self,
        model: str,
        directions: str | None,
        priors: dict[str, str],
        device: str,
        formats: tuple[PrecisionOption, PrecisionOption],
        threads: int,
        trust_remote_code: bool = False,
    ) -> None:
        # Imported here: the ingress imports this module to refer to the deployment, and does not need torch.
        import torch

        from dmm_ray.interventions import load_directions
        from dmm_ray.subject import SubjectModel

        torch.set_num_threads(threads)
        # Hooks and caches allow only one forward pass at a time, and alternating threads slow each other down (OpenMP).
        self._compute = ThreadPoolExecutor(1)
        precision, compute_dtype = formats[0], precision_on(formats[1], device)
        load = partial(
            SubjectModel.from_pretrained,
            model,
            head=True,
            device=device,
            dtype=getattr(torch, compute_dtype),
            trust_remote_code=trust_remote_code,
        )
        self._model = self._compute.submit(load).result()
        self._priors = self._compute.submit(self._fitting, priors, device, precision).result()
        self._directions = load_directions(directions) if directions else {}
        for direction in self._directions.values():
            self._check(direction)
        self._compute.submit(self._probe).result()
        self._compute.submit(
            lambda: self._model.generates
        ).result()  # run the trial now, not alongside another pass
        logger.info(
            "serving %s on %s in %s, directions: %d", model, device, compute_dtype, len(self._directions)
        )

    async def describe(self) -> SubjectInfo:
        """The model's shape; also serves as a liveness check."""
        m = self._model
        directions = [DirectionInfo(name=d.name, layer=d.layer) for d in self._directions.values()]
        return SubjectInfo(
            name=Path(m.model_id).name if Path(m.model_id).is_absolute() else m.model_id,
            layers=m.n_layers,
            context=m.context,
            generates=m.generates,
            priors=list(self._priors),
            directions=directions,
        )

    async def check_health(self) -> None:
        """Run the model on one token."""
        await self._run(self._probe)

    async def read(self, name: str, text: str, layer: int | None) -> TextRows:
        """The tokens of ``text`` and their activations at a layer modelled by prior ``name``.

        Raises:
            RequestError: 413 if the text is longer than the model's context, 422 if the prior is of another model.
            UserError: the prior does not model the layer, or the text has no tokens.
        """
        prior = self._prior(name)
        block = prior.layers[prior.layer_index(layer)]
        reading = await self._run(self._model.read, text, block)
        tokens = [TokenScore(text=p.text, start=p.start, end=p.end) for p in reading.pieces]
        return TextRows(tokens, block, reading.rows[1:].numpy())

    async def generate(self, name: str, body: GenerateBody) -> AsyncIterator[TokenEvent | Ended]:
        """New tokens as they are generated, then :class:`Ended`; other requests are served between two tokens.

        Raises:
            RequestError: as :meth:`read`.
            UserError: the direction does not exist or does not fit, or the model cannot generate.
        """
        generation = await self._run(self._start, name, body)
        while (token := await self._run(next, generation, None)) is not None:
            yield TokenEvent(id=token.id, text=token.text)
        yield Ended(await self._run(generation.nats), generation.finish)

    async def nearest(self, rows: np.ndarray, top: int) -> list[list[NearToken]]:
        """The ``top`` likeliest tokens of each activation (n, d) by the logit lens. Raises UserError for another d."""
        return await self._run(self._nearest, rows, top)

    def _nearest(self, rows: np.ndarray, top: int) -> list[list[NearToken]]:
        import torch

        if rows.shape[1] != self._model.d:
            raise UserError(
                f"activations: rows have {rows.shape[1]} numbers; this model's activations have d = {self._model.d}"
            )
        logits = self._model.lens(torch.from_numpy(rows.copy()).to(self._model.device))
        p, ids = torch.softmax(logits, dim=1).topk(min(top, logits.shape[1]))
        return [
            [
                NearToken(id=i, text=self._model.token_text(i), probability=q)
                for i, q in zip(*pair, strict=True)
            ]
            for pair in zip(ids.tolist(), p.tolist(), strict=True)
        ]

    def _start(self, name: str, body: GenerateBody) -> Generation:
        from dmm_ray.subject import Generation

        return Generation(
            self._model,
            body.prompt,
            self._interventions(name, body),
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            seed=body.seed,
        )

    def _interventions(self, name: str, body: GenerateBody) -> list[Intervention]:
        from dmm_ray.interventions import Steering

        prior, direction = self._prior(name), self._direction(body)
        if direction is None and not body.project:
            return []
        u = body.u if body.project else None
        steering = Steering(prior, direction, body.strength, u, body.steps, body.layer, body.seed)
        return [steering.intervention()]

    def _direction(self, body: GenerateBody) -> Direction | None:
        import torch

        from dmm_ray.interventions import Direction

        if body.direction is None or isinstance(body.direction, list):
            given = body.direction
            return None if given is None else Direction(REQUEST_DIRECTION, torch.tensor(given), body.layer)
        if body.direction not in self._directions:
            raise UserError("direction: no such direction; GET /v1/directions lists them")
        return self._directions[body.direction]

    def _prior(self, name: str) -> ActivationPrior:
        if name not in self._priors:
            raise RequestError(422, f"model: {name} is not a prior of this language model's activations")
        return self._priors[name]

    def _fitting(
        self, sources: dict[str, str], device: str, precision: PrecisionOption
    ) -> dict[str, ActivationPrior]:
        """The priors of this model's activations. Raises UserError if the default prior is not one of them."""
        from dmm_ray.prior import ActivationPrior
        from dmm_ray.store.match import check_subject

        found: dict[str, ActivationPrior] = {}
        for name, source in sources.items():
            prior = ActivationPrior.from_pretrained(source, device=device, precision=precision)
            try:
                check_subject(prior.config, self._model, source)
            except UserError as e:
                if not found:
                    raise
                logger.warning("prior %s has no text routes: %s", name, e)
            else:
                found[name] = prior
        return found

    def _check(self, direction: Direction) -> None:
        if len(direction.vector) != self._model.d:
            raise UserError(
                f"directions: {direction.name} has {len(direction.vector)} numbers; the model's d is {self._model.d}"
            )

    def _probe(self) -> None:
        input_ids, mask = self._model.pad([[0]])
        self._model.capture(input_ids, mask, [self._model.n_layers - 1])

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        """Run ``work`` in the computing thread. Raises RequestError 413 if a text is too long."""
        from dmm_ray.subject import TooLongError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, work, *arguments)
        except TooLongError as e:
            raise RequestError(413, str(e)) from e
