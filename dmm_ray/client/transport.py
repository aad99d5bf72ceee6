"""HTTP with patience: requests that a busy or restarting endpoint refuses are sent again, later."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator

import httpx

from dmm_ray.client.errors import ClientError, UnavailableError

RETRIED = frozenset({429, 502, 503, 504})
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
CONNECT_S = 10.0


class Transport:
    """Requests to one endpoint, from any thread.

    Args:
        url: its address, http:// or https://.
        token: a bearer token, if it wants one.
        timeout: longest wait of one try for an answer (of a stream: for more of it), seconds.
        retries: how often a request is tried again.
        deadline: after this many seconds it is not tried again.

    Raises:
        ClientError: an address or token that cannot be one.
    """

    def __init__(self, url: str, token: str | None, timeout: float, retries: int, deadline: float) -> None:
        _check(url, token)
        self._url = url
        self._timeout = timeout
        self._retries = retries
        self._deadline = deadline
        self._closed = threading.Event()
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_S)),
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        """End what waits, and the connections."""
        self._closed.set()
        self._http.close()

    def check_open(self) -> None:
        """Raises ClientError after :meth:`close`."""
        if self._closed.is_set():
            raise ClientError("the client is closed; make another one")

    def is_ready(self) -> bool:
        """Whether the endpoint says it is ready; one try."""
        self.check_open()
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, route: str) -> httpx.Response:
        """A 200 answer. Raises as ``post``."""
        return self._patiently(self._http.build_request("GET", route))

    def post(self, route: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        """A 200 answer.

        Raises:
            ClientError: another answer that asking again does not change.
            UnavailableError: no answer in time, or refusals and lost connections until the deadline.
        """
        return self._patiently(self._http.build_request("POST", route, content=content, headers=headers))

    @contextlib.contextmanager
    def stream(self, route: str, content: bytes, headers: dict[str, str]) -> Iterator[Iterator[bytes]]:
        """The body of a 200 answer as it comes. Raises as ``post``; what is lost once it came is not asked again."""
        request = self._http.build_request("POST", route, content=content, headers=headers)
        response = self._patiently(request, stream=True)
        try:
            yield response.iter_bytes()
        except (httpx.TransportError, httpx.DecodingError) as e:
            raise UnavailableError(f"{self._url}: the stream ended early ({_reason(e)})") from e
        finally:
            response.close()

    def _patiently(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        start = time.monotonic()
        for attempt in range(self._retries + 1):
            answer = self._try(request, stream)
            if isinstance(answer, httpx.Response):
                if answer.status_code == 200:
                    return answer
                _raise_final(answer)
            wait = _wait_s(answer, attempt)
            if attempt == self._retries or time.monotonic() + wait > start + self._deadline:
                break
            if self._closed.wait(wait):
                raise UnavailableError(f"{self._url}: the client was closed")
        seconds = time.monotonic() - start
        raise UnavailableError(
            f"{self._url}: gave up after {attempt + 1} tries in {seconds:.1f} s; the last: {_reason(answer)}"
        )

    def _try(self, request: httpx.Request, stream: bool) -> httpx.Response | httpx.TransportError:
        """An answer, or how the connection was lost. Raises UnavailableError for an answer that takes too long."""
        self.check_open()
        try:
            answer = self._http.send(request, stream=stream)
            if answer.status_code != 200:
                answer.read()
            return answer
        except (httpx.ReadTimeout, httpx.WriteTimeout) as e:
            raise UnavailableError(
                f"{self._url}: no answer in {self._timeout:g} s; ask for less or give a longer timeout"
            ) from e
        except httpx.DecodingError as e:
            raise UnavailableError(f"{self._url}: the answer cannot be decoded ({e})") from e
        except httpx.TransportError as e:
            return e


def _check(url: str, token: str | None) -> None:
    """Raises ClientError for an address or token that cannot be one."""
    try:
        known = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        known = False
    if not known:
        raise ClientError(f"url: http://HOST:PORT or https://... is needed (got {url!r})")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ClientError("token: printable ASCII without spaces around it; is it read from the right place?")


def _raise_final(answer: httpx.Response) -> None:
    """Raises where asking again will not help.

    A failure that is not in the endpoint's own words comes from something in front of it, such as Serve's proxy
    when the process behind it has died.
    """
    status, message = answer.status_code, _message(answer)
    if status in RETRIED or (status >= 500 and message is None):
        return
    if status >= 500:
        raise UnavailableError(f"HTTP {status}: {message}")
    raise ClientError(message or f"url: HTTP {status}; is this a dmm-ray endpoint?", status)


def _message(answer: httpx.Response) -> str | None:
    """The endpoint's line, if it is the endpoint that answers."""
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return None


def _wait_s(answer: httpx.Response | httpx.TransportError, attempt: int) -> float:
    """Exponential, with jitter, and never less than the endpoint asks for."""
    backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
    asked = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
    return backoff + (float(asked) if asked.isdecimal() else 0.0)


def _reason(answer: httpx.Response | httpx.TransportError | httpx.DecodingError) -> str:
    if isinstance(answer, httpx.TransportError | httpx.DecodingError):
        return f"{type(answer).__name__} {answer}".strip()
    return f"HTTP {answer.status_code} {_message(answer) or answer.reason_phrase}"
