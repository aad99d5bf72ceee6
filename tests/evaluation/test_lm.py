"""The delta LM loss: what is replaced, what is scored, and that all methods restore the same noised rows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmm_ray.batch.config import DenoiseConfig, EncodeConfig, ScoreConfig
from dmm_ray.config import Config
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.data import load, training_tokens
from dmm_ray.evaluation.lm import Documents, draw, restorations, sampled
from dmm_ray.evaluation.methods import SAE_VARIANTS, fit
from dmm_ray.evaluation.stages import measure_lm
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.verify import VerifyConfig
from dmm_ray.serving.config import AppConfig
from dmm_ray.store.split import Split
from dmm_ray.subject import SubjectModel
from dmm_ray.subject.encoding import ChatRefusedError
from dmm_ray.text.corpus import Corpus


@pytest.fixture(scope="module")
def subject(tiny_subject):
    return SubjectModel.from_pretrained(str(tiny_subject), head=True)


@pytest.fixture
def documents(subject):
    tokens = subject.tokenize(["the cat sat", "one big dog", "rain fell over green hills near lake", ""], 64)
    return Documents(subject, 1, dict(zip([3, 5, 8, 9], tokens, strict=True)))


def test_rows_are_positions_one_on_of_documents_that_have_something_to_predict(documents):
    assert set(documents.tokens) == {3, 5, 8}
    assert documents.ids[:, 1].min() == 1
    assert len(documents.ids) == sum(len(ids) - 1 for ids in documents.tokens.values())


def test_losses_are_the_models_own_one_document_at_a_time(documents, subject):
    found = documents.losses()
    for doc, ids in documents.tokens.items():
        own = subject.token_losses(*subject.pad([ids]))[0, 1:].numpy()
        here = found[documents.ids[:, 0].numpy() == doc]
        assert np.isnan(here[-1])
        np.testing.assert_allclose(here[:-1], own, atol=1e-4)


def test_putting_the_own_rows_back_changes_nothing_and_others_do(documents):
    rows, base = documents.capture(), documents.losses()
    np.testing.assert_allclose(documents.losses(rows), base, atol=1e-4)
    assert np.nanmax(np.abs(documents.losses(rows + 3) - base)) > 0.01


def test_a_replaced_row_touches_only_its_own_document_from_there_on(documents):
    rows, base = documents.capture(), documents.losses()
    at = int(((documents.ids[:, 0] == 8) & (documents.ids[:, 1] == 3)).nonzero()[0])
    rows[at] += 5
    changed = np.abs(documents.losses(rows) - base) > 1e-3
    before = documents.ids[:, 1].numpy() < 3
    assert changed[at]
    assert not changed[before | (documents.ids[:, 0].numpy() != 8)].any()


def test_drawn_documents_follow_the_seed_and_keep_their_order():
    tokens = {doc: [doc] * 4 for doc in range(50)}
    assert list(draw(tokens, 10, seed=1)) == sorted(draw(tokens, 10, seed=1))
    assert draw(tokens, 10, seed=1) != draw(tokens, 10, seed=2)
    assert len(draw(tokens, 500, seed=1)) == 50


def test_prior_and_posterior_means_restore_the_same_noised_rows(config):
    """The prior's own one-step mean, which adds its own noise, equals the posterior mean of the rows noised here."""
    inputs = load(config)
    methods = fit(config, inputs)
    ids = inputs.test.ids[:40]
    rows = inputs.prior.normalizer.denormalize(inputs.test.z[:40])
    found = dict(restorations(inputs, methods, rows, ids, u=0.5, seed=11))
    own = inputs.prior.denoise(rows, u=0.5, mode="mean", ids=ids, seed=11)
    assert torch.allclose(found["prior_mean"], own, atol=1e-4)
    assert set(found) == {"prior_mean", "untrained", "gaussian", "pca", "mixture", "factor_analysers"} | set(
        SAE_VARIANTS
    )
    drawn = sampled(inputs, rows, ids, u=0.5, seed=11)
    assert (drawn - own).square().mean() < 4 * (rows - own).square().mean()


def test_an_encoder_has_no_delta_lm_loss(caplog: pytest.LogCaptureFixture) -> None:
    """Nulls at once, in the place of an error after minutes of fitting."""
    inputs = SimpleNamespace(subject=SimpleNamespace(bidirectional=True, model_id="bert"))
    with caplog.at_level("INFO"):
        assert measure_lm(None, inputs, None) == {}  # type: ignore[arg-type]
    assert "bert is an encoder and predicts no next token" in caplog.text


def test_documents_that_failed_are_not_read_again(tiny_text: Path) -> None:
    """What the template refused at the extraction it refuses again."""

    class Refusing:
        def tokenize(self, texts: list[str], window: int) -> list[list[int]]:
            if corpus_text[3] in texts:
                raise ChatRefusedError("no")
            return [[len(text)] for text in texts]

    corpus = Corpus.scan([str(tiny_text)])
    corpus_text = [document.text or "" for document in corpus.read()]
    split = Split(seed=0, train=1.0, validation=0.0, test=0.0)
    with pytest.raises(ChatRefusedError):
        list(training_tokens(corpus, Refusing(), split, 64))  # type: ignore[arg-type]
    found = list(training_tokens(corpus, Refusing(), split, 64, {3}))  # type: ignore[arg-type]
    assert found == [[len(text)] for doc, text in enumerate(corpus_text) if doc != 3]


@pytest.mark.parametrize(
    "config",
    [ExtractConfig, VerifyConfig, EvaluateConfig, ScoreConfig, DenoiseConfig, EncodeConfig, AppConfig],
)
def test_code_of_a_model_s_own_can_be_allowed_wherever_one_is_loaded(config: type[Config]) -> None:
    assert "trust_remote_code" in config.owners() or "trust_remote_code" in config.model_fields
