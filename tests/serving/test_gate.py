"""The gate and the reading of bodies, around a small application of their own."""

from __future__ import annotations

import asyncio
import gzip
import io
import logging
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from dmm_ray.serving.http.answers import install_handlers
from dmm_ray.serving.http.auth import OPEN_PATHS, AccessTokens, hashes
from dmm_ray.serving.http.bodies import read_body
from dmm_ray.serving.http.gate import AccessMiddleware, Answered, log_access

MOST = 1000


def application(tokens: AccessTokens | None, record: Callable[[Answered], None]) -> FastAPI:
    api = FastAPI(docs_url=None, openapi_url=None)
    install_handlers(api)

    async def echo(request: Request) -> dict[str, Any]:
        body = await read_body(request, MOST, timeout_s=0.2)
        request.state.rows = 3
        return {"body": body.decode()}

    async def fine() -> dict[str, bool]:
        return {"fine": True}

    async def broken() -> None:
        raise ZeroDivisionError

    api.post("/v1/echo/{name}")(echo)
    api.get("/v1/broken")(broken)
    for path in OPEN_PATHS:
        api.get(path)(fine)
    api.add_middleware(AccessMiddleware, tokens=tokens, record=record)
    return api


def ask(
    method: str, path: str, tokens: AccessTokens | None = None, **options: Any
) -> tuple[httpx.Response, list[Answered]]:
    records: list[Answered] = []
    transport = httpx.ASGITransport(application(tokens, records.append))

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            return await client.request(method, path, **options)

    return asyncio.run(main()), records


def test_without_a_token_only_the_open_paths_answer() -> None:
    tokens = AccessTokens(hashes("right"), None)
    for path in OPEN_PATHS:
        assert ask("GET", path, tokens)[0].status_code == 200
    for path in ("/v1/echo/a", "/nothing", "/docs/", "/docs/x", "/v2", "/%2e"):
        found, _ = ask("POST", path, tokens, headers={"authorization": "Bearer wrong"})
        assert found.status_code == 401, path
        assert found.headers["www-authenticate"] == "Bearer"
        assert list(found.json()) == ["error"]
    found, _ = ask("POST", "/v1/echo/a", tokens, content=b"x", headers={"authorization": "Bearer right"})
    assert found.json() == {"body": "x"}


def test_a_prefix_before_the_application_changes_nothing() -> None:
    tokens, records = AccessTokens(hashes("right"), None), []
    transport = httpx.ASGITransport(application(tokens, records.append), root_path="/prefix")

    async def main() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            paths = ("/prefix/docs", "/prefix/v1/broken", "/prefix/prefix/docs")
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(main()) == [200, 401, 401]


def test_what_is_recorded_holds_the_route_and_not_the_request() -> None:
    log = io.StringIO()
    logger, handler = logging.getLogger("ray.serve.dmm"), logging.StreamHandler(log)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    secret = "do-not-log-me"
    try:
        for number in ("a-1", "bad\tid", "x" * 500):
            headers = {"x-request-id": number}
            _, records = ask("POST", f"/v1/echo/{secret}?{secret}", content=secret.encode(), headers=headers)
            log_access(records[0])
    finally:
        logger.removeHandler(handler)
    lines = log.getvalue().splitlines()
    assert secret not in log.getvalue()
    assert lines[0].startswith("POST /v1/echo/{name} 200 rows=3 ms=")
    assert [line.rpartition("id=")[2] for line in lines] == ["a-1", "-", "-"]


def test_unknown_paths_and_methods_are_recorded_under_one_name() -> None:
    assert ask("GET", "/secret/path")[1][0].route == "unrouted"
    assert ask("GET", "/openapi.json")[1][0].route == "/openapi.json"
    assert ask("BREW", "/coffee")[1][0].method == "other"


def test_a_bug_is_a_plain_500() -> None:
    found, records = ask("GET", "/v1/broken")
    assert (found.status_code, list(found.json())) == (500, ["error"])
    assert "ZeroDivision" not in found.text
    assert records[0].status == 500


def test_compressed_bodies_are_inflated() -> None:
    plain = b"0123456789" * 50
    for encoding, squeeze in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        headers = {"content-encoding": encoding}
        found, _ = ask("POST", "/v1/echo/a", content=squeeze(plain), headers=headers)
        assert found.json() == {"body": plain.decode()}


def squeezed(plain: bytes) -> bytes:
    return gzip.compress(plain, mtime=0)


BAD_BODIES = {
    "too large": (b"1" * (MOST + 1), None, 413),
    "too large when inflated": (squeezed(b"1" * (MOST + 1)), "gzip", 413),
    "a bomb": (squeezed(bytes(100_000)), "gzip", 413),
    "cut short": (squeezed(b"1")[:-2], "gzip", 400),
    "with a tail": (squeezed(b"1") + b"more", "gzip", 400),
    "not deflated": (b"plain", "deflate", 400),
    "an unknown encoding": (b"plain", "br", 422),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_too_large_or_damaged(name: str) -> None:
    content, encoding, status = BAD_BODIES[name]
    headers = {"content-encoding": encoding} if encoding else {}
    found, _ = ask("POST", "/v1/echo/a", content=content, headers=headers)
    assert (found.status_code, list(found.json())) == (status, ["error"])


def test_a_body_that_never_ends_is_given_up() -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"1"
            await asyncio.sleep(0.05)

    found, _ = ask("POST", "/v1/echo/a", content=drip())
    assert found.status_code == 408
