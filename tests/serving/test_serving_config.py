from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dmm_ray import cli
from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig, ServeConfig


def test_priors_by_name_default_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert AppConfig(prior=("x=owner/name", "a")).priors == {
        "default": str(tmp_path / "a"),
        "x": "owner/name",
    }
    assert list(AppConfig(prior=("x=a", "y=a")).priors) == ["x", "y"]
    assert AppConfig(prior="./odd=name").priors == {"default": "./odd=name"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prior": ()},
        {"prior": ("a", "b")},
        {"prior": ("n=a", "n=b")},
        {"prior": "a", "replicas": 0},
        {"prior": "a", "replicas": 3, "max_replicas": 2},
        {"prior": "a", "limits": {"max_rows": 1 << 20}},
        {"prior": "a", "unknown": 1},
        {"prior": "a", "auth": "none", "token_file": "t"},
        {"prior": "a", "directions": "d"},
    ],
)
def test_wrong_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppConfig.model_validate(fields)


def test_command_line() -> None:
    flags = ["--prior", "a", "--prior", "second=b", "--port", "0", "--limits.max-rows", "9"]
    config = cli.parse("serve", flags)[1]
    assert isinstance(config, ServeConfig)
    assert (config.priors, config.port, config.limits.max_rows) == ({"default": "a", "second": "b"}, 0, 9)
    with pytest.raises(UserError, match="port"):
        cli.parse("serve", ["--prior", "a", "--port", "70000"])


def test_the_builder_reads_string_arguments_and_refuses_wrong_ones(
    single: str, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DMM_SERVE_TOKENS", raising=False)
    builder({"prior": single, "replicas": "2", "max_batch_rows": "64", "auth": "none"})
    with pytest.raises(UserError, match="prior"):
        builder({})
    with pytest.raises(UserError, match="auth"):
        builder({"prior": single})
    with pytest.raises(UserError, match="port"):
        builder({"prior": single, "port": "8000"})
    with pytest.raises(UserError, match="replicas"):
        builder({"prior": single, "replicas": "many"})
