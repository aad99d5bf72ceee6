"""The oldest declared versions as pip constraints, for ``make versions``: ``python jobs/oldest.py > oldest.txt``."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
LOWER_BOUND = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9a-z.]*)")


def oldest(pyproject: Path = PYPROJECT) -> list[str]:
    """``name==version`` for every runtime dependency and those of every extra that users install.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    found = []
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        match = LOWER_BOUND.match(line)
        if match is None:
            raise ValueError(f"{line}: give it a lower bound, name>=version")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest()) + "\n")
