"""``GET /docs``: the routes and their schemas as one HTML page without scripts or external assets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

DOCS_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: routes</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #8881; padding: .7rem; font-size: .85rem; white-space: pre-wrap }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .3rem }} summary {{ cursor: pointer }}
td {{ padding: 0 .8rem 0 0; vertical-align: top }} :root {{ color-scheme: light dark }}
</style></head><body><h1>{title} {version}</h1><pre>{description}</pre>
<p>Machine-readable version: <a href="openapi.json">openapi.json</a> (OpenAPI).</p>
{routes}<details><summary>Schemas of the answers</summary><pre>{schemas}</pre></details></body></html>"""


def install(api: FastAPI) -> None:
    """Add the page to ``api``; it shows the routes that ``api`` has at the first request."""

    async def docs() -> HTMLResponse:
        return HTMLResponse(render(api.openapi()), headers={"Content-Security-Policy": DOCS_CSP})

    api.get("/docs", include_in_schema=False)(docs)


def render(schema: dict[str, Any]) -> str:
    """An OpenAPI schema as an HTML page."""
    info = schema["info"]
    routes = "".join(
        _route(method, path, described)
        for path, methods in schema["paths"].items()
        for method, described in methods.items()
    )
    return PAGE.format(
        title=escape(info["title"]),
        version=escape(info["version"]),
        description=escape(info.get("description", "")),
        routes=routes,
        schemas=_json(schema.get("components", {}).get("schemas", {})),
    )


def _route(method: str, path: str, described: dict[str, Any]) -> str:
    return (
        f"<section><h2>{escape(method.upper())} <code>{escape(path)}</code></h2>"
        f"<p>{escape(described.get('summary', ''))}</p>{''.join(_body(described))}"
        f"<details><summary>Answers</summary><table>{_answers(described)}</table></details></section>"
    )


def _body(described: dict[str, Any]) -> Iterator[str]:
    for kind, content in described.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        for example in schema.get("examples", []):
            yield f"<p>Example, {escape(kind)}:</p><pre>{escape(json.dumps(example))}</pre>"
        yield f"<details><summary>Body, {escape(kind)}</summary><pre>{_json(schema)}</pre></details>"


def _answers(described: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td>{escape(str(status))}</td><td>{escape(answer.get('description', ''))}</td></tr>"
        for status, answer in described.get("responses", {}).items()
    )


def _json(value: Any) -> str:
    return escape(json.dumps(value, indent=2))
