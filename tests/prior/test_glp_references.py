"""References inside of a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmm_ray.errors import UserError
from dmm_ray.prior.references import Settings

TEXT = r"""
a: {b: 3, c: "${.b}", d: "${..word}", e: "${a.${name}}", 4: four}
word: hi
name: b
half: "n${name}"
list: [1, "${list[0]}", "${.0}", "${..word}-x", "${a.4}"]
path: !!python/object/apply:pathlib.PosixPath
- runs
- x
escaped: \${a} of ${.word}
map: ${a}
through: ${map.c}
nothing: null
text: "${word} ${a.b} ${nothing} $"
twice: "${half}${half}"
loop: x${loop2}
loop2: ${loop}
inside: {it: "${inside}"}
missing: ${nope.x}
far: ${....word}
strange: ${a b}
open: ${a
asked: "???"
env: ${oc.env:HOME}
sum: ${eval:1+1}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "config.yaml").write_text(TEXT)
    return Settings(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", {"b": 3, "c": 3, "d": "hi", "e": 3, 4: "four"}),
        ("list", [1, 1, 1, "hi-x", "four"]),
        ("list.1", 1),
        ("path", "runs/x"),
        ("escaped", "${a} of hi"),
        ("map.d", "hi"),
        ("through", 3),
        ("nothing", None),
        ("text", "hi 3 None $"),
        ("twice", "nbnb"),
    ],
)
def test_values(settings, key, value):
    assert settings.get(key) == value


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("loop", "loop -> loop2 -> loop refer to each other in a circle"),
        ("inside", "inside -> inside refer to each other"),
        ("missing", r"missing refers to \$\{nope.x\}, but there is no nope"),
        ("far", "which is not a key"),
        ("strange", "which is not a key"),
        ("open", "is not closed"),
        ("asked", "no asked; add it"),
        ("a.z", "no a.z; add it"),
        ("word.z", "no word.z; add it"),
        ("env", "a resolver, which is not run"),
        ("sum", "a resolver, which is not run"),
    ],
)
def test_refusals(settings, key, says):
    with pytest.raises(UserError, match=says):
        settings.get(key)
    assert settings.get("word") == "hi"


def test_what_is_not_asked_for_may_be_missing(settings):
    assert settings.find("nope.x") is None
    assert settings.keys("inside") == {"it"}
    assert settings.keys("word") == settings.keys("nope") == set()
