"""One name for one thing: no class name in two modules, no constant of one name with several values."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1] / "dmm_ray"
MODULES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def test_a_class_name_stands_in_one_module() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(str(path.relative_to(ROOT)))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_a_constant_has_one_value() -> None:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id.isupper() and len(target.id) > 1:
                        found[target.id][ast.unparse(node.value)] = str(path.relative_to(ROOT))
    assert {name: values for name, values in found.items() if len(values) > 1} == {}
