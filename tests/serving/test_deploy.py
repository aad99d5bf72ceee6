from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmm_ray.errors import UserError
from dmm_ray.serving.deploy import check

SHIPPED = Path(__file__).parents[2] / "serve" / "config.yaml"


def changed(tmp_path: Path, change: Any) -> str:
    content = yaml.safe_load(SHIPPED.read_text())
    change(content)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "config.yaml")


def test_the_shipped_file_passes_ours_and_serve_s() -> None:
    from ray.serve.schema import ServeDeploySchema

    found = check(str(SHIPPED))
    assert found.applications[0].args.priors == {"default": "/data/priors/default"}
    serve = ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text()))
    assert serve.applications[0].import_path == "serve.app:app"


def application(content: dict[str, Any]) -> dict[str, Any]:
    return content["applications"][0]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c: c.update(proxy="EveryNode"), "proxy"),
        (lambda c: c["http_options"].update(hots="::"), "http_options.hots"),
        (lambda c: c["http_options"].update(port=70000), "http_options.port"),
        (lambda c: c["http_options"].update(host="0.0.0.0"), "auth: none"),
        (lambda c: application(c).update(import_path="app:app"), "applications.0.import_path"),
        (lambda c: application(c)["args"].update(replica=2), "applications.0.args.replica"),
        (lambda c: application(c)["args"]["limits"].update(max_rows="many"), "args.limits.max_rows"),
        (lambda c: c.pop("applications"), "applications"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_field(tmp_path: Path, change: Any, names: str) -> None:
    with pytest.raises(UserError) as caught:
        check(changed(tmp_path, change))
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dmm_ray.serving.deploy"]
    assert subprocess.run([*command, str(SHIPPED)], timeout=60).returncode == 0
    wrong = changed(tmp_path, lambda c: application(c)["args"].update(replica=2))
    found = subprocess.run([*command, wrong], timeout=60, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "replica" in found.stderr
