"""The client without an endpoint: what it sends, when it tries again, what it raises."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from client.scripted import Answer, serving

from dmm_ray.client import Client, ClientError, GeneratedText, Token, UnavailableError
from dmm_ray.client.events import events
from dmm_ray.client.rows import RequestRows
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.protocol import pack, unpack

MODELS = Answer(body=json.dumps({"models": [{"name": "a", "d": 4, "layers": [2]}], "subject": None}).encode())
BUSY = Answer(503, b'{"error": "the queue is full"}')
TOTAL = {"text": "ab", "tokens": [{"id": 1, "text": "ab", "nats": 0.5}], "nll": 0.5, "finish": "length"}


def test_the_client_needs_neither_ray_nor_torch() -> None:
    code = "import sys, dmm_ray.client; sys.exit(str({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "trouble",
    [
        BUSY,
        Answer(429, b'{"error": "slowly"}'),
        Answer(502, b"Bad gateway"),
        Answer(500, b"Internal Server Error"),
        Answer(0),
        Answer(200, MODELS.body, cut=True),
    ],
)
def test_troubles_that_pass_are_waited_for(trouble: Answer) -> None:
    with serving(trouble, trouble, MODELS) as script, Client(script.url) as client:
        assert client.models().priors[0].layers == (2,)
        assert len(script.seen) == 3


def test_retry_after_is_honoured() -> None:
    asked = Answer(503, BUSY.body, {"Retry-After": "1"})
    with serving(asked, MODELS) as script, Client(script.url) as client:
        client.models()
        first, second = (when for _, _, when in script.seen)
        assert second - first >= 1.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(401, b'{"error": "Authorization: no"}'), "Authorization: no"),
        (Answer(422, b'{"error": "layer: 5"}'), "layer: 5"),
        (Answer(404, b"<html>"), "url: HTTP 404"),
    ],
)
def test_refusals_are_the_user_s_errors_and_asked_once(answer: Answer, message: str) -> None:
    with serving(answer) as script, Client(script.url) as client:
        with pytest.raises(ClientError, match=message) as caught:
            client.models()
        assert caught.value.status == answer.status
        assert isinstance(caught.value, UserError)
        assert len(script.seen) == 1


def test_a_failure_in_the_endpoint_s_words_is_not_asked_again() -> None:
    with serving(Answer(500, b'{"error": "a bug"}')) as script, Client(script.url) as client:
        with pytest.raises(UnavailableError, match="500: a bug"):
            client.models()
        assert len(script.seen) == 1


def test_retries_and_deadline_end_it() -> None:
    with serving(BUSY) as script, Client(script.url, retries=2) as client:
        with pytest.raises(CheckFailed, match=r"gave up after 3 tries .* HTTP 503 the queue is full"):
            client.models()
        assert len(script.seen) == 3
    late = Answer(503, BUSY.body, {"Retry-After": "60"})
    with (
        serving(late) as script,
        Client(script.url, deadline=10) as client,
        pytest.raises(UnavailableError, match="after 1 tries in 0"),
    ):
        client.models()


def test_nobody_there(unused_port: int) -> None:
    with Client(f"http://127.0.0.1:{unused_port}", retries=1) as client:
        assert not client.ready()
        with pytest.raises(UnavailableError, match="ConnectError"):
            client.models()


@pytest.fixture
def unused_port() -> int:
    with serving(MODELS) as script:
        return int(script.url.rpartition(":")[2])


def test_a_slow_answer_is_not_asked_for_again() -> None:
    with serving(Answer(headers={"hold": "1"})) as script, Client(script.url, timeout=0.2) as client:
        with pytest.raises(UnavailableError, match=r"no answer in 0\.2 s"):
            client.models()
        assert len(script.seen) == 1


def test_closing_ends_the_waiting() -> None:
    with serving(Answer(503, BUSY.body, {"Retry-After": "60"})) as script, ThreadPoolExecutor(1) as pool:
        client = Client(script.url)
        waiting = pool.submit(client.models)
        while not script.seen:
            assert not waiting.done()
        client.close()
        with pytest.raises((UnavailableError, RuntimeError), match="closed"):
            waiting.result(timeout=10)


def test_the_token_is_sent() -> None:
    with serving(MODELS) as script, Client(script.url, token="secret") as client:
        client.models()
        assert script.seen[0][1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("token", ["", " a", "a\n", "\u00e9"])
def test_a_token_that_cannot_be_one(token: str) -> None:
    with pytest.raises(ClientError, match="token"):
        Client("http://127.0.0.1:1", token=token)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda c: c.log_prob(np.zeros(4)), "x"),
        (lambda c: c.denoise(np.zeros((0, 4))), "x"),
        (lambda c: c.encode(np.zeros((2, 4)), ids=[1]), "ids"),
        (lambda c: c.encode(np.zeros((2, 4)), ids=[1.0, 2.0]), "ids"),
        (lambda c: c.sample(0), "n"),
        (lambda c: c.sample(2.0), "n"),
        (lambda c: c.log_prob(np.zeros((2, 4), complex)), "x"),
        (lambda c: c.log_prob(np.ma.masked_array(np.zeros((2, 4)), True)), "x"),
        (lambda c: c.log_prob([[1.0, None]]), "x"),
        (lambda c: c.log_prob([["1"]]), "x"),
        (lambda c: c.log_prob([[1.0], [1.0, 2.0]]), "x"),
        (lambda c: c.log_prob(None), "x"),
        (lambda c: c.denoise(np.zeros((2, 4)), u=[0.1, 0.2, 0.3]), "u"),
        (lambda c: c.denoise(np.zeros((2, 4)), u=1j), "u"),
        (lambda c: c.denoise(np.zeros((2, 4)), distance=float("nan")), "distance"),
        (lambda c: c.generate("once", "up", strength=object()), "strength"),
    ],
)
def test_what_cannot_be_rows_is_not_sent(ask, field: str) -> None:
    with serving(MODELS) as script, Client(script.url) as client:
        with pytest.raises(ClientError, match=f"^{field}: "):
            ask(client)
        assert not script.seen


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://host:port"])
def test_what_cannot_be_an_address(url: str) -> None:
    with pytest.raises(ClientError, match="url"):
        Client(url)


def test_an_answer_of_something_else() -> None:
    with serving(MODELS) as script, Client(script.url) as client:
        with pytest.raises(UnavailableError, match="not a dmm-ray endpoint's"):
            client.sample(1)
        assert script.seen[0][0] == "/v2/models/sample/infer"
        with Client(script.url, model="a/b") as other, pytest.raises(UnavailableError):
            other.sample(1)
        assert script.seen[1][0] == "/v2/models/a%2Fb.sample/infer"


@pytest.mark.parametrize("body", ["<html>Please log in</html>", "[]", "3", '{"models": 3}', ""])
def test_a_proxy_s_page_is_no_answer(body: str) -> None:
    with serving(Answer(body=body.encode())) as script, Client(script.url) as client:
        asks = [
            client.models,
            lambda: client.score_text("a"),
            lambda: client.generate("a"),
            lambda: client.sample(1),
        ]
        for ask in [*asks, lambda: list(client.generate_stream("a"))]:
            with pytest.raises(UnavailableError, match=r"not a dmm-ray endpoint|ended before"):
                ask()


def test_a_closed_client_says_so() -> None:
    with serving(MODELS) as script:
        client = Client(script.url)
        client.close()
        for ask in (client.models, client.ready, lambda: client.sample(1), lambda: client.score_text("a")):
            with pytest.raises(ClientError, match="the client is closed"):
                ask()
        with pytest.raises(ClientError, match="the client is closed"):
            next(client.generate_stream("a"))
        assert not script.seen


def test_events_are_read_as_the_standard_says() -> None:
    text = (
        "\N{ZERO WIDTH NO-BREAK SPACE}: a comment\r\ndata:one\r\ndata: two\r\nevent: kind\r\nid: 7\r\n\r\n"
        "retry: 100\n\nevent: without data\n\ndata\n\ndata: \u00e9\r\rdata: cut off"
    )
    expected = [("kind", "one\ntwo"), ("message", ""), ("message", "\u00e9")]
    raw = text.encode()
    for size in (1, 2, 3, 7, len(raw)):
        assert list(events(raw[i : i + size] for i in range(0, len(raw), size))) == expected


def test_torch_s_rows_are_rows() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = RequestRows.given(
            torch.ones(2, 3, dtype=dtype, requires_grad=True), torch.tensor([1, 2]), torch.tensor([0.5, 1])
        )
        assert x.x is not None
        assert x.levels is not None
        assert (x.x.dtype, x.x.tolist(), x.ids.tolist()) == (np.float32, [[1.0] * 3] * 2, [1, 2])
        assert x.levels.tolist() == [0.5, 1.0]


def test_streamed_events() -> None:
    token = b'event: token\ndata: {"id": 1, "text": "a\xe2\x80\xa8b"}\n\n'
    done = b"event: done\ndata: " + json.dumps(TOTAL).encode() + b"\n\n"
    with serving(BUSY, Answer(body=token + done)) as script, Client(script.url) as client:
        first, last = client.generate_stream("once", strength=0.5)
        assert first == Token(1, "a\u2028b")
        assert isinstance(last, GeneratedText)
        assert (last.text, last.nats.tolist(), last.nll) == ("ab", [0.5], 0.5)
    failed = token + b'event: error\ndata: {"error": "restarting"}\n\n'
    troubles = (
        (Answer(body=failed), "restarting"),
        (Answer(body=token, cut=True), "ended early"),
        (Answer(body=token), "ended before the text did"),
        (Answer(body=token + b"event: done\ndata: {}\n\n"), "not a dmm-ray endpoint's"),
        (Answer(body=token + b"event: token\ndata: <html>\n\n"), "It begins '<html>'"),
    )
    for body, message in troubles:
        with serving(body) as script, Client(script.url) as client:
            items = client.generate_stream("once")
            assert isinstance(next(items), Token)
            with pytest.raises(UnavailableError, match=message):
                next(items)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_sent_as_it_is(dtype) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    tensors = RequestRows.given(x, [[1, 2], [3, 4]]).tensors()
    assert tensors["activations"].dtype == x.dtype
    body, length = pack(tensors, {"u": 0.5, "layer": None})
    head = json.loads(body[:length])
    assert head["parameters"] == {"u": 0.5, "binary_data_output": True}
    assert [one["shape"] for one in head["inputs"]] == [[2, 3], [2, 2]]
    assert body[length:] == x.tobytes() + np.array([[1, 2], [3, 4]], np.int64).tobytes()


def test_other_numbers_become_float32() -> None:
    for x in ([[1, 2]], np.array([[1.0, 2.0]]), np.array([[1, 2]], np.int64)):
        found = RequestRows.given(x, None).x
        assert found is not None
        assert found.dtype == np.float32
        assert found.tolist() == [[1.0, 2.0]]


def test_an_answer_is_read_in_order() -> None:
    a, b = np.arange(4, dtype=np.float32).reshape(2, 2), np.array([7])
    outputs = [
        {"name": "a", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
        {"name": "b", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
    ]
    head = json.dumps({"outputs": outputs}).encode()
    found = unpack(head + a.tobytes() + b.tobytes(), len(head))
    np.testing.assert_array_equal(found["a"], a)
    np.testing.assert_array_equal(found["b"], b)
    with pytest.raises(ValueError, match="0 bytes; shape"):
        unpack(head + a.tobytes(), len(head))


def test_parts_keep_the_names_of_the_whole() -> None:
    parts = list(RequestRows.given(np.zeros((5, 2)), None).cut(2))
    assert [(p.start, p.ids.tolist()) for p in parts] == [(0, [0, 1]), (2, [2, 3]), (4, [4])]
    assert [p.start for p in parts[1].cut(1)] == [2, 3]
    assert [p.tensors()["n"].tolist() for p in RequestRows.drawn(3, None).cut(2)] == [[2], [1]]
