"""The client and a real endpoint: the same numbers as in this process, in parts or in one request."""

from __future__ import annotations

import doctest
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from serving.text_app import TEXT, TOKEN, Files

from dmm_ray.client import Client, ClientError, GeneratedText, Token
from dmm_ray.client import client as client_module
from dmm_ray.prior import ActivationPrior

D = 32


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as c:
        yield c


@pytest.fixture(scope="module")
def prior(files: Files) -> ActivationPrior:
    return ActivationPrior.from_pretrained(files.default)


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, D)).astype(np.float32)


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_every_operation_is_the_prior_s(client: Client, prior: ActivationPrior) -> None:
    x, ids = rows(5), np.array([[3, 1], [3, 2], [4, 1], [9, 9], [0, 1]])
    t = torch.from_numpy(x)
    found = client.log_prob(x, layer=2, steps=4, probes=2, ids=ids, seed=7)
    expected = prior.log_prob(t, layer=2, steps=4, probes=2, ids=ids, seed=7)
    close(found.nats, expected.nats)
    close(found.nats_per_dim, expected.nats_per_dim)
    assert found.stderr is not None
    assert expected.stderr is not None
    close(found.stderr, expected.stderr)
    assert (found.percentile, found.latent_percentile, found.evaluations) == (None, None, 8)
    assert client.log_prob(x, steps=2, probes=1).stderr is None
    close(client.denoise(x, u=0.3, steps=4, seed=1), prior.denoise(t, u=0.3, steps=4, seed=1))
    close(
        client.denoise(x, mode="mean", ids=range(5, 10)), prior.denoise(t, mode="mean", ids=np.arange(5, 10))
    )
    close(client.encode(x, u=0.2, block=0, seed=3), prior.encode(t, u=0.2, block=0, seed=3))
    close(
        client.sample(3, steps=4, seed=2, ids=[5, 6, 7]),
        prior.sample(3, steps=4, seed=2, ids=np.arange(5, 8)),
    )


def test_parts_give_what_one_request_gives(url: str, prior: ActivationPrior) -> None:
    x = rows(130)
    with Client(url, chunk_rows=16, in_flight=3) as small, Client(url) as halving:
        for client in (
            small,
            halving,
        ):  # the endpoint refuses more than 60 rows: the second one's are halved twice
            close(
                client.log_prob(x, steps=2, seed=4).nats,
                prior.log_prob(torch.from_numpy(x), steps=2, seed=4).nats,
            )
            close(client.denoise(x, steps=2), prior.denoise(torch.from_numpy(x), steps=2))
            close(client.sample(130, steps=2), prior.sample(130, steps=2))
        named = small.encode(x, ids=np.arange(130)[::-1])
        close(named, prior.encode(torch.from_numpy(x), ids=np.arange(130)[::-1].copy()))


def test_a_prior_by_name_with_percentiles(url: str, files: Files) -> None:
    prior, x = ActivationPrior.from_pretrained(files.pair), rows(3)
    expected = prior.log_prob(torch.from_numpy(x), layer=1, steps=4)
    with Client(url, model="pair") as client:
        found = client.log_prob(x, layer=1, steps=4)
        assert found.percentile is not None
        assert found.latent_percentile is not None
        assert expected.percentile is not None
        close(found.percentile, expected.percentile)
        with pytest.raises(ClientError, match="layers 1, 3"):
            client.log_prob(x)


def test_refusals(url: str, guarded: str, client: Client) -> None:
    with Client(url + guarded, token=TOKEN) as known:
        assert known.sample(1).shape == (1, D)
    with Client(url + guarded, token="wrong") as stranger:
        assert stranger.ready()
        with pytest.raises(ClientError, match="Authorization") as caught:
            stranger.sample(1)
        assert caught.value.status == 401
    with Client(url, model="nobody") as lost, pytest.raises(ClientError, match="no such prior"):
        lost.sample(1)
    with pytest.raises(ClientError, match="steps: 2001 requested, at most 2000"):
        client.sample(1, steps=2001)
    x = rows(40)
    x[33] = 1e38
    with Client(url, chunk_rows=10) as parts:
        with pytest.raises(ClientError, match=r"^rows 30 to 39: .*answer for row 3 is NaN or Inf"):
            parts.log_prob(x, steps=2)
        assert np.isfinite(parts.log_prob(rows(40), steps=2).nats).all()


def test_models(client: Client, files: Files) -> None:
    found = client.models()
    priors = [("default", D, (2,)), ("pair", D, (1, 3)), ("other", 16, (2,))]
    assert [(p.name, p.d, p.layers) for p in found.priors] == priors
    assert found.subject is not None
    assert found.subject.priors == ("default", "pair")
    assert {(d.name, d.layer) for d in found.subject.directions} == {("up", 2), ("down", None)}


def test_texts(client: Client) -> None:
    found = client.score_text(TEXT, steps=3)
    assert len(found.tokens) == len(found.start) == len(found.end) == len(found.nats)
    assert TEXT[found.start[-1] : found.end[-1]] == found.tokens[-1]
    assert np.isnan(found.nats[0])
    assert np.isfinite(found.nats[1:]).all()
    assert np.isnan(found.percentile).all()
    whole = client.generate("the cat", "up", strength=0.5, max_tokens=5, steps=2, seed=1)
    assert len(whole.tokens) == len(whole.nats) <= 5
    *tokens, last = client.generate_stream("the cat", "up", strength=0.5, max_tokens=5, steps=2, seed=1)
    assert isinstance(last, GeneratedText)
    assert last.text == whole.text == "".join(token.text for token in tokens if isinstance(token, Token))
    assert last.nll == whole.nll == pytest.approx(whole.nats.mean())
    same = client.generate("the cat", list(range(D)), layer=2, strength=0.5, max_tokens=5, steps=2, seed=1)
    assert same.text == whole.text
    with pytest.raises(ClientError, match="no such direction"):
        client.generate("the cat", "sideways", max_tokens=5)
    with pytest.raises(ClientError, match="no such direction"):
        next(client.generate_stream("the cat", "sideways", max_tokens=5))


def test_the_examples_in_its_docstrings(url: str) -> None:
    with Client(url) as client:
        names = {"client": client, "x": rows(3)}
        found = doctest.testmod(client_module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 10
    assert not found.failed
