"""``python -m dmm_ray.serving.deploy FILE``: check a file for ``serve deploy``, whose own schema accepts typos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError, model_validator

from dmm_ray.config import Config, load_yaml, one_line
from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig
from dmm_ray.serving.http.auth import is_loopback


class HttpOptions(Config):
    """HTTP options of Serve's proxies."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback requires tokens."""
    port: int = Field(default=8000, gt=0, le=65535)
    """Port on every node that has a proxy."""
    keep_alive_timeout_s: int = Field(default=5, gt=0)
    """How long an idle connection is kept open, in seconds."""
    ssl_certfile: str | None = None
    """Certificate, on every node; with ssl_keyfile, the proxies use TLS."""
    ssl_keyfile: str | None = None
    """Key of the certificate."""


class LoggingConfig(Config):
    """Serve's logs."""

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = False
    """Serve's own access log; the application writes one itself."""


class Application(Config):
    """One application; others may run beside it under other prefixes."""

    name: str = Field(min_length=1)
    route_prefix: str = Field(pattern=r"^/")
    import_path: Literal["serve.app:app"]
    args: AppConfig
    runtime_env: dict[str, Any] = Field(default={})
    """Ray's runtime environment: `working_dir`, `env_vars`, ..."""


class DeployFile(Config):
    """A file for ``serve deploy`` that contains our applications."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    logging_config: LoggingConfig = LoggingConfig()
    applications: tuple[Application, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tokens_beyond_loopback(self) -> DeployFile:
        host = self.http_options.host
        if not is_loopback(host) and any(app.args.auth == "none" for app in self.applications):
            raise ValueError(
                f"auth: none, but {host} is reachable from other machines; use tokens, or listen on loopback"
            )
        return self


def check(path: str) -> DeployFile:
    """The validated content of a deploy file. Raises UserError naming the file and the first invalid field."""
    try:
        return DeployFile.model_validate(load_yaml(path))
    except ValidationError as e:
        raise UserError(f"{path}: {one_line(e)}") from e


def main(arguments: list[str]) -> NoReturn:
    """Exit with 0 for a valid file, or with 2 and one line on stderr."""
    try:
        if len(arguments) != 1:
            raise UserError("give one YAML file")
        check(arguments[0])
    except UserError as e:
        sys.stderr.write(f"{Path(__file__).stem}: {e}\n")
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
