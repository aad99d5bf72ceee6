"""HTTP with retries: requests that a busy or restarting endpoint refuses are sent again later."""

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
    """Requests to one endpoint; thread-safe.

    Args:
        url: its address, http:// or https://.
        token: a bearer token, if required.
        timeout: maximum wait per try for an answer (in a stream, for the next bytes), in seconds.
        retries: maximum number of retries per request.
        deadline: a request is not retried after this many seconds.

    Raises:
        ClientError: the address or token is invalid.
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
        """Stop waiting requests and close the connections."""
        self._closed.set()
        self._http.close()

    def check_open(self) -> None:
        """Raises ClientError after :meth:`close`."""
        if self._closed.is_set():
            raise ClientError("the client is closed; create a new one")

    def is_ready(self) -> bool:
        """Whether the endpoint reports that it is ready; no retries."""
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
            ClientError: any other answer that a retry would not change.
            UnavailableError: no answer in time, or only refusals and lost connections until the deadline.
        """
        return self._patiently(self._http.build_request("POST", route, content=content, headers=headers))

    @contextlib.contextmanager
    def stream(self, route: str, content: bytes, headers: dict[str, str]) -> Iterator[Iterator[bytes]]:
        """The body of a 200 answer as it arrives. Raises as ``post``; a stream that breaks off is not retried."""
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
        """An answer, or the error that broke the connection. Raises UnavailableError if the answer takes too long."""
        self.check_open()
        try:
            answer = self._http.send(request, stream=stream)
            if answer.status_code != 200:
                answer.read()
            return answer
        except (httpx.ReadTimeout, httpx.WriteTimeout) as e:
            raise UnavailableError(
                f"{self._url}: no answer in {self._timeout:g} s; request less or give a longer timeout"
            ) from e
        except httpx.DecodingError as e:
            raise UnavailableError(f"{self._url}: the answer cannot be decoded ({e})") from e
        except httpx.TransportError as e:
            return e


def _check(url: str, token: str | None) -> None:
    """Raises ClientError if the address or token is invalid."""
    try:
        known = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        known = False
    if not known:
        raise ClientError(f"url: must be http://HOST:PORT or https://... (got {url!r})")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ClientError(
            "token: must be printable ASCII without surrounding spaces; check where it is read from"
        )


def _raise_final(answer: httpx.Response) -> None:
    """Raises if a retry will not help.

    A failure without the endpoint's own message comes from something in front of it, such as Serve's proxy when the
    replica behind it has died; it is retried.
    """
    status, message = answer.status_code, _message(answer)
    if status in RETRIED or (status >= 500 and message is None):
        return
    if status >= 500:
        raise UnavailableError(f"HTTP {status}: {message}")
    raise ClientError(message or f"url: HTTP {status}; is this a dmm-ray endpoint?", status)


def _message(answer: httpx.Response) -> str | None:
    """The endpoint's error message, if the answer is the endpoint's own."""
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return None


def _wait_s(answer: httpx.Response | httpx.TransportError, attempt: int) -> float:
    """Exponential backoff with jitter, never less than the endpoint's Retry-After."""
    backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
    asked = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
    return backoff + (float(asked) if asked.isdecimal() else 0.0)


def _reason(answer: httpx.Response | httpx.TransportError | httpx.DecodingError) -> str:
    if isinstance(answer, httpx.TransportError | httpx.DecodingError):
        return f"{type(answer).__name__} {answer}".strip()
    return f"HTTP {answer.status_code} {_message(answer) or answer.reason_phrase}"
