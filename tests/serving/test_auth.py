from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig, ServeConfig
from dmm_ray.serving.http.auth import VARIABLE, AccessTokens, hashes, is_loopback, settled, tokens_of


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(prior=("p",), **fields)


def test_each_of_several_tokens_is_admitted() -> None:
    tokens = AccessTokens(hashes("first, second\nthird"), None)
    for token in ("first", "second", "third"):
        assert tokens.admit(f"Bearer {token}")
        assert tokens.admit(f"bearer {token}")
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer fourth",
        "Basic first",
        "first",
        "Bearer first, second",
    ):
        assert not tokens.admit(wrong)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("one\ntwo\n")
    tokens = AccessTokens((), str(path))
    assert tokens.admit("Bearer two")
    (tmp_path / "new").write_text("three\n")
    os.replace(tmp_path / "new", path)
    assert tokens.admit("Bearer three")
    assert not tokens.admit("Bearer two")
    path.unlink()
    assert not tokens.admit("Bearer three")
    path.write_text("four\n")
    assert tokens.admit("Bearer four")


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        AccessTokens((), str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="none given"):
        AccessTokens((), str(tmp_path / "empty"))


def test_the_application_needs_tokens_or_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="auth: none"):
        tokens_of(AppConfig(prior=("p",)))
    assert tokens_of(AppConfig(prior=("p",), auth="none")) is None
    monkeypatch.setenv(VARIABLE, "a,b")
    assert tokens_of(AppConfig(prior=("p",))) == (hashes("a b"), None)


def test_tokens_are_not_kept_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "secret-word")
    assert "secret-word" not in repr(tokens_of(AppConfig(prior=("p",))))


def test_a_loopback_address_does_without_tokens_unless_some_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settled(config()).auth == "none"
    monkeypatch.setenv(VARIABLE, "a")
    assert settled(config()).auth is None
    assert settled(config(auth="none")).auth == "none"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.9", "some-machine"])
def test_another_address_needs_tokens(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for fields in ({}, {"auth": "none"}):
        with pytest.raises(UserError, match=VARIABLE):
            settled(config(host=host, **fields))
    with pytest.raises(UserError, match="token_file"):
        settled(config(host=host, token_file=str(tmp_path / "none")))
    monkeypatch.setenv(VARIABLE, "a")
    settled(config(host=host))
    with pytest.raises(UserError, match=VARIABLE):
        settled(config(host=host, auth="none"))


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


def test_a_byte_order_mark_is_no_part_of_the_first_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first\nsecond\n", encoding="utf-8-sig")
    tokens = AccessTokens((), str(file))
    assert tokens.admit("Bearer first")
    assert tokens.admit("Bearer second")


def test_tokens_that_no_header_carries_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokens"
    file.write_text("caf\u00e9\n", encoding="utf-8")
    with pytest.raises(UserError, match="tokens: one contains non-ASCII characters"):
        settled(config(token_file=str(file)))
    monkeypatch.setenv(VARIABLE, "caf\u00e9")
    with pytest.raises(UserError, match="tokens: one contains non-ASCII characters"):
        settled(config())


def test_a_file_that_becomes_unusable_admits_nobody(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first\n")
    tokens = AccessTokens((), str(file))
    assert tokens.admit("Bearer first")
    file.write_text("second and caf\u00e9\n", encoding="utf-8")
    assert not tokens.admit("Bearer first")
    assert not tokens.admit("Bearer second")
    file.write_text("third token\n")
    assert tokens.admit("Bearer third")
