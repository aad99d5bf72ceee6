"""Declared versions: every dependency has a lower bound, and what CI installs is within what is declared."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module() -> Any:
    """``jobs/oldest.py``."""
    spec = importlib.util.spec_from_file_location("oldest", ROOT / "jobs" / "oldest.py")
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


def test_every_dependency_has_a_lower_bound(module: Any, tmp_path: Path) -> None:
    pins = {Requirement(line).name: str(Requirement(line).specifier) for line in module.oldest()}
    assert pins["ray"] == "==2.60"
    assert set(pins) == {r.name for r in requirements("s3", "gcs", "large", "gguf")}
    (tmp_path / "p.toml").write_text('[project]\ndependencies = ["torch"]\n[project.optional-dependencies]\n')
    with pytest.raises(ValueError, match="torch: give it a lower bound"):
        module.oldest(tmp_path / "p.toml")


def test_what_ci_installs_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }
    assert all(pinned.values()), "every line of constraints.txt is name==version"
    for requirement in requirements("dev"):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement
