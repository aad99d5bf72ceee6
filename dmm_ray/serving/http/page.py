"""The page at ``/``: one HTML file without external assets; its policy allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from dmm_ray.serving.http.context import Context

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def install(api: FastAPI, context: Context) -> None:
    """Add the page to ``api``. It queries the routes under ``/v1`` and so does not depend on ``context``."""
    html = files("dmm_ray.serving.http").joinpath("page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": policy(html), "Cache-Control": "no-cache"}

    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    api.get("/", include_in_schema=False)(page)


def policy(html: str) -> str:
    """A Content-Security-Policy that allows the script and style of ``html`` and no others."""
    return POLICY.format(script=_hash(html, "script"), style=_hash(html, "style"))


def _hash(html: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
