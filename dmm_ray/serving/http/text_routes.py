"""The text routes: token-by-token scores of texts, steered generation, and the nearest tokens of activations."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json
from ray.exceptions import RayTaskError

from dmm_ray.errors import UserError
from dmm_ray.serving.deployments.calls import array_call
from dmm_ray.serving.deployments.handles import DeploymentClient
from dmm_ray.serving.errors import DOCUMENTED, RequestError
from dmm_ray.serving.http.context import Context
from dmm_ray.serving.schemas import LogProbParameters, SampleParameters, request_schema
from dmm_ray.serving.text_schemas import (
    DirectionsAnswer,
    Ended,
    GenerateAnswer,
    GenerateBody,
    ModelInfo,
    ModelsAnswer,
    NearestTokensAnswer,
    NearestTokensBody,
    NewToken,
    ScoreTextAnswer,
    ScoreTextBody,
    TextRows,
    TokenEvent,
)

Route = Callable[[Request], Awaitable[Response]]
NO_SUBJECT = (
    "no language model is attached to this endpoint; start it with --model MODEL (`model:` in its arguments)"
)


def install(api: FastAPI, context: Context) -> None:
    """Add the text routes to ``api``; without a subject they answer 404 and explain how to attach one."""
    routes = TextRoutes(context)
    posts: list[tuple[Route, type[BaseModel], type[BaseModel]]] = [
        (routes.score_text, ScoreTextBody, ScoreTextAnswer),
        (routes.generate, GenerateBody, GenerateAnswer),
        (routes.nearest_tokens, NearestTokensBody, NearestTokensAnswer),
    ]
    for route, body, answer in posts:
        api.post(
            f"/v1/{route.__name__}",
            summary=(body.__doc__ or "").splitlines()[0],
            response_class=JSONResponse,
            responses={200: {"model": answer}, **DOCUMENTED},
            openapi_extra={"requestBody": request_schema(body)},
        )(route)
    gets: list[tuple[Route, str, type[BaseModel]]] = [
        (routes.directions, "List the directions available for steering.", DirectionsAnswer),
        (routes.models, "List the priors and the language model.", ModelsAnswer),
    ]
    for route, summary, answer in gets:
        api.get(f"/v1/{route.__name__}", summary=summary, responses={200: {"model": answer}, **DOCUMENTED})(
            route
        )


class TextRoutes:
    """Handlers of the text routes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def score_text(self, request: Request) -> Response:
        """Log-probability of the activation at each token."""
        subject = self._subject()
        body = await self._context.read_json(request, ScoreTextBody)
        self._check_length("text", body.text)
        name = self._context.priors.resolve(body.model)
        read: TextRows = await subject.ask("read", name, body.text, body.layer)
        request.state.rows = n = len(read.activations)
        nats, percentile = await self._log_prob(name, body, read) if n else (np.empty(0), None)
        columns = [nats.tolist(), [None] * n if percentile is None else percentile.tolist()]
        scores = [(None, None), *zip(*columns, strict=True)]
        tokens = [
            token.model_copy(update={"nats": a, "percentile": b})
            for token, (a, b) in zip(read.tokens, scores, strict=True)
        ]
        return _json(ScoreTextAnswer(tokens=tokens))

    async def generate(self, request: Request) -> Response:
        """New tokens, all at once or as server-sent events."""
        subject = self._subject()
        body = await self._context.read_json(request, GenerateBody)
        self._check_generation(body)
        name = self._context.priors.resolve(body.model)
        items = subject.stream("generate", name, body)
        if not body.stream:
            async with contextlib.aclosing(items):
                found = [item async for item in items]
            request.state.rows = len(found) - 1
            return _json(_total(found))
        first = await anext(items)  # until something is sent, a refusal can still be a plain error answer
        return StreamingResponse(
            _events(request, first, items),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def nearest_tokens(self, request: Request) -> Response:
        """Nearest tokens of given activations or of samples of the prior."""
        subject = self._subject()
        body = await self._context.read_json(request, NearestTokensBody)
        rows = await self._drawn(body, body.n) if body.n else _matrix(body.activations or [])
        request.state.rows = len(rows)
        return _json(NearestTokensAnswer(rows=await subject.ask("nearest", rows, body.top)))

    async def directions(self, request: Request) -> Response:
        """Names of the directions."""
        return _json(DirectionsAnswer(directions=(await self._subject().ask("describe")).directions))

    async def models(self, request: Request) -> Response:
        """The priors and the language model."""
        priors, subject = self._context.priors, self._context.subject
        infos = {name: await priors.info(name) for name in priors.names}
        models = [
            ModelInfo(name=name, d=i.d, layers=list(i.layers), precision=i.precision)
            for name, i in infos.items()
        ]
        return _json(
            ModelsAnswer(models=models, subject=None if subject is None else await subject.ask("describe"))
        )

    def _subject(self) -> DeploymentClient:
        if self._context.subject is None:
            raise RequestError(404, NO_SUBJECT)
        return self._context.subject

    def _check_length(self, field: str, text: str) -> None:
        most = self._context.limits.max_text_chars
        if len(text) > most:
            raise RequestError(413, f"{field}: {len(text)} characters, at most {most}; send it in parts")

    def _check_generation(self, body: GenerateBody) -> None:
        limits = self._context.limits
        self._check_length("prompt", body.prompt)
        for field, count, most in (
            ("max_tokens", body.max_tokens, limits.max_tokens),
            ("steps", body.steps, limits.max_steps),
            ("max_tokens x steps x 2", body.max_tokens * body.steps * 2, limits.max_work),
        ):
            if count > most:
                raise RequestError(413, f"{field}: {count} requested, at most {most} per request")

    async def _log_prob(
        self, name: str, body: ScoreTextBody, read: TextRows
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Nats and percentiles of a text's rows, whose ids are (0, position)."""
        n = len(read.activations)
        ids = np.stack([np.zeros(n, np.int64), np.arange(1, n + 1)], axis=1)
        told = body.model_dump(include=set(LogProbParameters.model_fields)) | {"layer": read.layer}
        arguments = LogProbParameters(**told)
        info = await self._context.priors.info(name)
        call, rows = array_call(arguments, n, read.activations, ids, info, self._context.limits)
        columns = await self._context.priors.compute(name, call, rows)
        nats, percentile = columns["nats"], columns["percentile"]
        assert isinstance(nats, np.ndarray)
        assert percentile is None or isinstance(percentile, np.ndarray)
        return nats, percentile

    async def _drawn(self, body: NearestTokensBody, n: int) -> np.ndarray:
        name = self._context.priors.resolve(body.model)
        arguments = SampleParameters(**body.model_dump(include=set(SampleParameters.model_fields)))
        info = await self._context.priors.info(name)
        call, rows = array_call(arguments, n, None, None, info, self._context.limits)
        drawn = (await self._context.priors.compute(name, call, rows))["activations"]
        assert isinstance(drawn, np.ndarray)
        return drawn


async def _events(
    request: Request, first: TokenEvent | Ended, items: AsyncGenerator[Any, None]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a generation: one ``token`` each, then ``done`` with the full answer, or ``error``.

    It is closed when the client disconnects, which ends the generation.
    """
    found: list[TokenEvent | Ended] = [first]
    async with contextlib.aclosing(items):
        try:
            while not isinstance(found[-1], Ended):
                yield _event("token", found[-1])
                found.append(await anext(items))
                request.state.rows = len(found) - 1
        except (RequestError, UserError) as e:
            cause = e.cause if isinstance(e, RayTaskError) else e
            yield _event("error", {"error": cause.message if isinstance(cause, RequestError) else str(cause)})
        else:
            yield _event("done", _total(found))


def _event(kind: str, value: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), to_json(value))


def _total(found: list[TokenEvent | Ended]) -> GenerateAnswer:
    """The answer of a generation, from its items; the last one is :class:`Ended`."""
    ended = found[-1]
    assert isinstance(ended, Ended)
    tokens = [item for item in found if isinstance(item, TokenEvent)]
    new = [NewToken(**t.model_dump(), nats=n) for t, n in zip(tokens, ended.nats, strict=True)]
    nll = sum(ended.nats) / len(new) if new else None
    return GenerateAnswer(text="".join(t.text for t in new), tokens=new, nll=nll, finish=ended.finish)


def _matrix(activations: list[list[float]]) -> np.ndarray:
    """Given rows as float32 (n, any). Raises RequestError 422 if their lengths differ or numbers are too large."""
    if len({len(row) for row in activations}) != 1:
        raise RequestError(422, "activations: rows must have equal length")
    with np.errstate(over="ignore"):
        rows = np.asarray(activations, dtype=np.float64).astype(np.float32)
    if not np.isfinite(rows).all():
        raise RequestError(422, "activations: a number is too large for a 32-bit float")
    return rows


def _json(answer: BaseModel) -> Response:
    return Response(to_json(answer), media_type="application/json")
