"""Bearer tokens: their sources, and the check of a request's token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re

from dmm_ray.errors import UserError
from dmm_ray.serving.config import AppConfig, ServeConfig

logger = logging.getLogger("ray.serve.dmm")
VARIABLE = "DMM_SERVE_TOKENS"
TOKEN_REMEDY = f"set {VARIABLE} in the environment or give a token file"
OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: health, the page itself and the documentation of the routes."""


class AccessTokens:
    """The tokens that requests are checked against; only their SHA-256 digests are kept.

    Args:
        hashes: digests of the fixed tokens.
        file: local path of a file with one token per line, reloaded when it changes; if it disappears, all of its
            tokens are rejected.

    Raises:
        UserError: the file does not exist, or there are no tokens at all.
    """

    def __init__(self, hashes: tuple[bytes, ...], file: str | None) -> None:
        self._fixed = hashes
        self._file = file
        self._started = False
        self._stamp: tuple[int, int, int] | None = None
        self._read: tuple[bytes, ...] = ()
        if file is not None and not os.path.isfile(file):
            raise UserError(f"token_file: {file}: no such file; write one token per line into it")
        if not self._hashes():
            raise UserError(f"tokens: none given; {TOKEN_REMEDY}")
        self._started = True

    def admit(self, authorization: str | None) -> bool:
        """Whether an Authorization header contains a valid token; takes equally long either way."""
        scheme, _, token = (authorization or "").partition(" ")
        given = _hash(token.strip())
        matches = [hmac.compare_digest(given, known) for known in self._hashes()]
        return any(matches) and scheme.lower() == "bearer"

    def _hashes(self) -> tuple[bytes, ...]:
        if self._file is not None:
            self._refresh(self._file)
        return self._fixed + self._read

    def _refresh(self, file: str) -> None:
        try:
            status = os.stat(file)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                with open(
                    file, encoding="utf-8-sig"
                ) as f:  # some editors put a byte-order mark before the first token
                    self._read = hashes(f.read())
                self._stamp = stamp
        except (OSError, UnicodeDecodeError, UserError) as e:
            if isinstance(e, UserError) and not self._started:
                raise
            if self._read:
                logger.error("cannot read the token file, rejecting its tokens: %s", e)
            self._read, self._stamp = (), None


def hashes(text: str) -> tuple[bytes, ...]:
    """The SHA-256 of each token in ``text``, separated by commas or white space.

    Raises:
        UserError: a token contains non-ASCII characters, which an Authorization header cannot carry unchanged.
    """
    if not text.isascii():
        raise UserError(
            "tokens: one contains non-ASCII characters, which HTTP headers cannot carry; use ASCII only"
        )
    return tuple(_hash(token) for token in re.split(r"[,\s]+", text) if token)


def tokens_of(config: AppConfig) -> tuple[tuple[bytes, ...], str | None] | None:
    """The arguments of ``AccessTokens`` from ``config`` and this process's environment; None for ``auth: none``.

    Raises:
        UserError: there are neither tokens nor ``auth: none``.
    """
    if config.auth == "none":
        return None
    found = hashes(os.environ.get(VARIABLE, ""))
    if not found and config.token_file is None:
        raise UserError(
            f"auth: no tokens; {TOKEN_REMEDY}, or set `auth: none` if nobody else can reach the address"
        )
    return found, config.token_file


def settled(config: ServeConfig) -> ServeConfig:
    """``config`` with ``auth`` resolved by the address: a loopback address needs no tokens unless some are given.

    Raises:
        UserError: the address is reachable from other machines and there are no tokens.
    """
    given = config.token_file is not None or bool(hashes(os.environ.get(VARIABLE, "")))
    if not is_loopback(config.host) and (config.auth == "none" or not given):
        raise UserError(
            f"host: {config.host} is reachable from other machines, which requires tokens; {TOKEN_REMEDY}"
        )
    if config.auth is None and not given:
        return config.model_copy(update={"auth": "none"})
    if config.auth != "none":
        arguments = tokens_of(config)
        assert arguments
        AccessTokens(*arguments)
    return config


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
