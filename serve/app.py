"""Entry point for `serve run serve.app:app prior=DIR` and `serve deploy serve/config.yaml`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray.serve import Application

from dmm_ray.config import one_line
from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig


def app(args: dict[str, Any]) -> Application:
    """The application for Serve's arguments, the fields of ``AppConfig``. Raises UserError if they are invalid."""
    from dmm_ray.serving.app import build

    try:
        return build(AppConfig.model_validate(args))
    except ValidationError as e:
        raise UserError(one_line(e)) from e
