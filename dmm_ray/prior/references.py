"""YAML files whose values may refer to others in the same file: ``${a.b}``, ``${.sibling}``, ``${a.${b}}``.

The notation is OmegaConf's. Only requested keys are resolved, nothing is evaluated, and resolvers such as
``${oc.env:HOME}`` are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from dmm_ray.errors import UserError
from dmm_ray.files import read_bytes

INNERMOST = re.compile(r"\$\{([^${}]*)\}")
REFERENCE = re.compile(r"(\.*)([\w-]+(?:\.[\w-]+|\[[\w-]+\])*)")
ESCAPED = "\0"
"""Stands for an escaped or already resolved ``${`` while a value is being resolved."""
MISSING = "???"
"""OmegaConf's marker of a value that is yet to be given."""

Path = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """A safe loader that also reads paths, which OmegaConf writes as Python objects, as strings."""


def _path_text(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "a path is a list of parts", node.start_mark)
    return "/".join(map(str, loader.construct_sequence(node)))


_Loader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:pathlib.", _path_text)


class NoKeyError(LookupError):
    """The file lacks a key."""


class Settings:
    """A YAML file's mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._open: list[Path] = []
        try:
            self._tree = yaml.load(read_bytes(uri), Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise UserError(f"{uri}: not valid YAML ({' '.join(str(e).split())}); copy the file again") from e
        if not isinstance(self._tree, dict):
            raise UserError(f"{uri}: not a mapping of keys to values; copy the file again")

    def get(self, key: str) -> Any:
        """The value at a dotted key, its references resolved.

        Raises:
            UserError: the key is missing, or a value refers to a missing key, to itself, or to a resolver.
        """
        try:
            return self._value(tuple(key.split(".")))
        except NoKeyError as e:
            raise UserError(f"{self.uri}: no {key}; add it to the file") from e

    def find(self, key: str) -> Any | None:
        """Like :meth:`get`, but None if the key is missing."""
        try:
            return self._value(tuple(key.split(".")))
        except NoKeyError:
            return None

    def keys(self, key: str) -> set[str]:
        """The keys of the mapping at ``key``, without resolving its values; empty if it is not a mapping."""
        try:
            node = self._node(tuple(key.split(".")))
        except NoKeyError:
            return set()
        return set(map(str, node)) if isinstance(node, dict) else set()

    def _value(self, path: Path) -> Any:
        if path in self._open:
            circle = " -> ".join(".".join(p) for p in [*self._open[self._open.index(path) :], path])
            raise UserError(f"{self.uri}: {circle} refer to each other in a circle; write one of them out")
        self._open.append(path)
        try:
            return self._resolved(self._node(path), path)
        finally:
            self._open.pop()

    def _node(self, path: Path) -> Any:
        """The node at ``path``; a reference along the way is followed, one at the end is not."""
        node = self._tree
        for i, key in enumerate(path):
            if isinstance(node, str) and "${" in node:
                node = self._value(path[:i])
            if isinstance(node, dict) and key in (names := {str(k): k for k in node}):
                node = node[names[key]]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise NoKeyError(".".join(path[: i + 1]))
        if node == MISSING:
            raise NoKeyError(".".join(path))
        return node

    def _resolved(self, node: Any, path: Path) -> Any:
        if isinstance(node, dict):
            return {key: self._resolved(child, (*path, str(key))) for key, child in node.items()}
        if isinstance(node, list):
            return [self._resolved(child, (*path, str(i))) for i, child in enumerate(node)]
        return self._expanded(node, path) if isinstance(node, str) else node

    def _expanded(self, text: str, path: Path) -> Any:
        """``text`` with its references replaced, inner ones first; a value that is just a reference keeps its type."""
        text = text.replace("\\${", ESCAPED)
        while match := INNERMOST.search(text):
            value = self._referred(match[1].strip(), path)
            if match[0] == text:
                return value
            text = text[: match.start()] + str(value).replace("${", ESCAPED) + text[match.end() :]
        if "${" in text:
            raise UserError(f"{self.uri}: {'.'.join(path)} holds a ${{ that is not closed; close it")
        return text.replace(ESCAPED, "${")

    def _referred(self, expression: str, path: Path) -> Any:
        """The value of ``${expression}`` found at ``path``; n leading dots are relative to its n-th parent."""
        where = f"{self.uri}: {'.'.join(path)} refers to ${{{expression}}}"
        if ":" in expression:
            raise UserError(f"{where}, a resolver, which is not run; write the value itself")
        match = REFERENCE.fullmatch(expression)
        if not match or len(match[1]) > len(path):
            raise UserError(f"{where}, which is not a key; write the value itself")
        base = path[: len(path) - len(match[1])] if match[1] else ()
        try:
            return self._value((*base, *re.findall(r"[\w-]+", match[2])))
        except NoKeyError as e:
            raise UserError(f"{where}, but there is no {e}; add it or write the value itself") from e
