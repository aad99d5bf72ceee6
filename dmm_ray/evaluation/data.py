"""Loading and checking the inputs of an evaluation: the prior, the store's rows by part, the test documents' tokens."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmm_ray.errors import UserError
from dmm_ray.evaluation.config import EvaluateConfig
from dmm_ray.evaluation.prefixes import unseen_prefixes
from dmm_ray.extraction.identity import changed_part, warn_of_versions
from dmm_ray.precision import Precision, affordable_precision
from dmm_ray.prior import ActivationPrior
from dmm_ray.store.manifest import DTYPES
from dmm_ray.store.match import check_finite, check_fits
from dmm_ray.store.reader import ActivationStore
from dmm_ray.store.split import PARTS, TEST, TRAIN, VALIDATION, Split
from dmm_ray.subject import SubjectModel, SubjectSource
from dmm_ray.subject.config import ModelSource
from dmm_ray.text.corpus import Corpus

logger = logging.getLogger(__name__)
TOKENIZE_DOCUMENTS = 512


@dataclass(frozen=True)
class EvaluationRows:
    """Rows of one part of the document split, in the prior's normalised space."""

    z: Tensor
    """(n, d) float32."""
    ids: Tensor
    """(n, 2) int64: document and position."""

    @property
    def docs(self) -> np.ndarray:
        """The document of each row."""
        return self.ids[:, 0].numpy(force=True)


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything an evaluation needs."""

    prior: ActivationPrior
    layer: int
    store: ActivationStore
    subject: SubjectModel
    compute_dtype: Precision
    """Number format of the subject's computation."""
    train: EvaluationRows
    validation: EvaluationRows
    test: EvaluationRows
    tokens: dict[int, list[int]]
    """Token ids of the test documents, position 0 included, by document number."""
    unseen: dict[int, np.ndarray] | None
    """Whether no training document starts with each position's prefix, by document number."""

    def is_unseen(self, ids: Tensor) -> np.ndarray | None:
        """Whether no training document starts with the prefix of each row of ``ids`` (n, 2); None if not requested."""
        if self.unseen is None:
            return None
        return np.array([self.unseen[doc][position] for doc, position in ids.tolist()], dtype=bool)


def load(config: EvaluateConfig) -> EvaluationInputs:
    """Open and check all inputs.

    Raises:
        UserError: the prior, store, model and text do not belong together, a part has no documents, or a row contains
            NaN or Inf.
    """
    device = pick_device(config.device)
    prior = ActivationPrior.from_pretrained(config.prior, device=device, precision=config.precision)
    store = ActivationStore.open(config.activations)
    layer = prior.layers[prior.layer_index(config.layer)]
    check_fits(prior.config, store, layer, same_model=True)
    manifest = store.manifest
    compute_dtype = (
        affordable_precision(manifest.compute_dtype, device)
        if config.compute_dtype == "auto"
        else config.compute_dtype
    )
    logger.info("on %s: the prior in %s, the language model in %s", device, prior.precision, compute_dtype)
    asked = model_source(config, store)
    subject = SubjectModel.from_pretrained(
        asked.model or manifest.subject.id,
        head=True,
        device=device,
        dtype=DTYPES[compute_dtype],
        revision=asked.revision,
        block_path=asked.block_path,
        trust_remote_code=asked.trust_remote_code,
    )
    check_same_model(subject.source, store)
    warn_of_versions(manifest.subject, store.uri)
    corpus = open_corpus(config, store)
    split = Split.model_validate(prior.config.split)
    limits = {TRAIN: config.train_rows, VALIDATION: config.validation_rows, TEST: config.max_rows}
    parts = {
        part: read_part(store, prior, layer, split, part, rows, config.seed) for part, rows in limits.items()
    }
    # Documents that the extraction was allowed to skip (--max-failed-documents) have no rows and would fail again.
    failed = frozenset(doc for record in store.records for doc, _ in record.failed)
    tokens = test_tokens(corpus, subject, manifest.window, parts[TEST])
    unseen = None
    if config.unseen_prefix:
        unseen = unseen_prefixes(tokens, training_tokens(corpus, subject, split, manifest.window, failed))
    return EvaluationInputs(
        prior,
        layer,
        store,
        subject,
        compute_dtype,
        parts[TRAIN],
        parts[VALIDATION],
        parts[TEST],
        tokens,
        unseen,
    )


def pick_device(device: str) -> str:
    """``device`` with auto resolved. Raises UserError for cuda if no GPU is available."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU is available; give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def model_source(config: EvaluateConfig, store: ActivationStore) -> ModelSource:
    """Where the store's language model is: as configured, or else as recorded."""
    entry = store.manifest.subject
    return config.subject.recorded(entry.id, entry.revision, entry.block_path)


def check_same_model(source: SubjectSource, store: ActivationStore) -> None:
    """Raises UserError if the store was not extracted with this model."""
    if changed := changed_part(source, store.manifest):
        raise UserError(
            f"model: {source.model_id}: {changed} is not what {store.uri} was extracted with "
            f"({store.manifest.subject.id}); give that model with --model"
        )


def open_corpus(config: EvaluateConfig, store: ActivationStore) -> Corpus:
    """The text that the store was extracted from. Raises UserError if it is missing or differs."""
    entry = store.manifest.text
    uris = [config.text] if isinstance(config.text, str) else config.text or list(entry.uris)
    corpus = Corpus.scan(uris, entry.text_field, entry.separator)
    if corpus.hash != entry.hash:
        raise UserError(
            f"text: {', '.join(uris)} is not the text that {store.uri} was extracted from; "
            "give the same files with --text"
        )
    return corpus


def read_part(
    store: ActivationStore,
    prior: ActivationPrior,
    layer: int,
    split: Split,
    part: int,
    max_rows: int,
    seed: int,
) -> EvaluationRows:
    """Normalised rows of a part, without position 0 and without positions beyond the first window of a document.

    Raises:
        UserError: there are none, or one contains NaN or Inf.
    """
    rows = store.select(layer, split, part, max_rows, seed)
    check_finite(store, layer, rows)
    later = (rows.position > 0) & (rows.position < store.manifest.window)
    if not later.any():
        raise UserError(
            f"activations: {store.uri} has no {PARTS[part]} documents; extract more text (about 1 document in "
            f"{1 / max(getattr(split, PARTS[part]), 1e-9):.0f} is assigned to that part)"
        )
    ids = torch.from_numpy(np.stack([rows.doc, rows.position.astype(np.int64)], axis=1)[later])
    x = rows.activation[torch.from_numpy(later)].to(prior.device)
    return EvaluationRows(prior.normalizer.normalize(x, prior.layer_index(layer)), ids.to(prior.device))


def test_tokens(
    corpus: Corpus, subject: SubjectModel, window: int, test: EvaluationRows
) -> dict[int, list[int]]:
    """Token ids of the test part's documents, position 0 included, by document number."""
    return dict(_tokenized(corpus, subject, window, np.unique(test.docs).tolist()))


def training_tokens(
    corpus: Corpus, subject: SubjectModel, split: Split, window: int, failed: Container[int] = ()
) -> Iterator[list[int]]:
    """Yield the token ids of every training document except those that ``failed`` during extraction."""
    for first in range(0, corpus.n_documents, TOKENIZE_DOCUMENTS):
        docs = np.arange(first, min(first + TOKENIZE_DOCUMENTS, corpus.n_documents))
        kept = set(docs[split.of(docs) == TRAIN].tolist())
        documents = corpus.read(first, first + TOKENIZE_DOCUMENTS)
        read = [d for d in documents if d.doc in kept and d.doc not in failed]
        yield from (ids for ids in subject.tokenize([d.content for d in read], window) if ids)


def _tokenized(
    corpus: Corpus, subject: SubjectModel, window: int, docs: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and token ids of each document of ``docs`` that has text."""
    for doc in docs:
        (document,) = corpus.read(doc, doc + 1)
        if ids := subject.tokenize([document.content], window)[0]:
            yield doc, ids
