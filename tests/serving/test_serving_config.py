from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dmm_ray import cli
from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig, ServeConfig

ROOT = Path(__file__).parents[2]


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


class _Application(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    route_prefix: str
    import_path: str
    args: dict[str, Any]


class _HttpOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    host: str
    port: int


class _DeployFile(BaseModel):
    """Serve's own schema lets unknown keys pass."""

    model_config = ConfigDict(extra="forbid", strict=True)
    proxy_location: str
    http_options: _HttpOptions
    applications: list[_Application]


def test_the_deploy_file_is_strictly_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    ServeDeploySchema.model_validate(content)
    (application,) = _DeployFile.model_validate(content).applications
    assert application.import_path == "serve.app:app"
    AppConfig.model_validate(application.args)


def test_the_builder_reads_string_arguments_and_refuses_wrong_ones(single: str, builder: Any) -> None:
    builder({"prior": single, "replicas": "2", "max_batch_rows": "64"})
    with pytest.raises(UserError, match="prior"):
        builder({})
    with pytest.raises(UserError, match="port"):
        builder({"prior": single, "port": "8000"})
    with pytest.raises(UserError, match="replicas"):
        builder({"prior": single, "replicas": "many"})
