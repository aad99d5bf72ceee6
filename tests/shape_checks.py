"""The shape suffixes of names, held against the tensors that come: ``z_ND`` has two dimensions, N and D.

jaxtyping and beartype check every call of the functions and methods of a package whose tensor arguments carry such a
suffix, as if they were annotated with it: the number of dimensions, and that those of the same letter are of one size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Shaped, jaxtyped
from torch import Tensor

SUFFIX = re.compile(r"_([A-Z0-9]{1,5}|[ndkl1]{1,3})$")
"""Small letters, of the baselines: n rows, d dimensions, k components, l latents."""
TENSORS = frozenset({"Tensor", "torch.Tensor"})
checked = functools.partial(jaxtyped, typechecker=beartype)


def dimensions(name: str) -> str | None:
    """``"N D"`` for ``z_ND``; None for a name without a shape."""
    found = SUFFIX.search(name)
    return None if found is None else " ".join(found[1])


def shapes(function: Callable[..., Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Annotations of the arguments that are tensors of a known shape."""
    annotated = inspect.get_annotations(function)
    return {
        name: Shaped[Tensor, dims]
        for name, kind in annotated.items()
        if kind in TENSORS and (dims := known.get(name) or dimensions(name)) is not None
    }


def check_shapes(package: str, **known: str) -> int:
    """Check the calls of every function and method of a package from now on; the number of those with shapes.

    Args:
        package: its full name; its modules are imported.
        known: shapes of arguments that always have the same one there, as in ``z="N D"``, by name.
    """
    count = 0
    for module in _modules(package):
        for owner in [
            module,
            *(c for c in vars(module).values() if _belongs(c, module) and inspect.isclass(c)),
        ]:
            for name, function in list(vars(owner).items()):
                if not inspect.isfunction(function) or not _belongs(function, module):
                    continue
                if not hasattr(function, "__shapes__") and (found := shapes(function, known)):
                    _replace(owner, name, function, _with_shapes(function, found))
                count += hasattr(vars(owner)[name], "__shapes__")
    return count


def _with_shapes(function: Callable[..., Any], found: dict[str, Any]) -> Any:
    function.__annotations__ = found
    checking = checked(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The compiler cannot trace the checks.
        return (function if torch.compiler.is_compiling() else checking)(*args, **kwargs)

    call.__shapes__ = found  # type: ignore[attr-defined]
    return call


def _replace(owner: Any, name: str, function: Any, checking: Any) -> None:
    """Here and in every module that has imported it."""
    setattr(owner, name, checking)
    if isinstance(owner, ModuleType):
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("dmm_ray") and vars(module).get(name) is function:
                setattr(module, name, checking)


def _modules(package: str) -> Iterator[ModuleType]:
    top = importlib.import_module(package)
    yield top
    for found in pkgutil.walk_packages(top.__path__, f"{package}."):
        yield importlib.import_module(found.name)


def _belongs(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__
