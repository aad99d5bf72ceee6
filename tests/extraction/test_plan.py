"""What is said before an extraction, against what it then writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import make_texts

from dmm_ray.errors import UserError
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.engine import Loading
from dmm_ray.extraction.extract import make_manifest
from dmm_ray.extraction.plan import (
    CorpusSample,
    ExtractionPlan,
    calibrate,
    choose_documents_per_unit,
    worth_calibrating,
)
from dmm_ray.store.reader import ActivationStore, file_sizes
from dmm_ray.store.token_selection import TokenSelection
from dmm_ray.subject import SubjectSource
from dmm_ray.text.corpus import Corpus


def draw(text: Path, model: Path, **kept: object) -> CorpusSample:
    tokenizer = SubjectSource.resolve(str(model)).tokenizer
    return CorpusSample.draw(Corpus.scan([str(text)]), 64, TokenSelection(**kept), 0, tokenizer)


@pytest.fixture
def plan(tiny_text: Path, tiny_subject: Path, tmp_path: Path) -> ExtractionPlan:
    config = ExtractConfig(
        model=str(tiny_subject), text=str(tiny_text), layers=[1, 2], dtype="float32", out=str(tmp_path)
    )
    source, corpus = config.subject.resolve(), Corpus.scan(config.uris)
    sample = CorpusSample.draw(corpus, 64, config.kept, 0, source.tokenizer)
    return ExtractionPlan(make_manifest(config, "float32", source, 4, corpus, 64, sample), sample)


def test_a_small_corpus_is_counted_exactly(tiny_store: Path, plan: ExtractionPlan) -> None:
    store = ActivationStore.open(str(tiny_store))
    assert plan.sample.rows == store.rows
    assert plan.sample.tokens == sum(record.tokens for record in store.records)
    written = sum(file_sizes(str(tiny_store)).values())
    assert plan.bytes == pytest.approx(written, rel=0.5)  # Parquet's frame weighs on shards of 700 rows
    assert f"about {store.rows:,} rows of 60 documents in each of 2 layers (d 32, float32)" in plan.line()


def test_a_large_corpus_is_estimated(tiny_subject: Path, tmp_path: Path) -> None:
    texts = make_texts(3000, seed=5)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    sample = draw(tmp_path / "t.jsonl", tiny_subject)
    assert len(sample.pieces) == 256
    source = SubjectSource.resolve(str(tiny_subject))
    rows = sum(min(len(ids), 64) - 1 for ids in source.tokenizer(texts)["input_ids"])
    assert sample.rows == pytest.approx(rows, rel=0.1)
    assert draw(tmp_path / "t.jsonl", tiny_subject).rows == sample.rows
    assert draw(tmp_path / "t.jsonl", tiny_subject, tokens_per_doc="last").rows == 3000


def test_units_of_a_size() -> None:
    sample = CorpusSample(
        documents=1_000_000, pieces=(), rows_per_document=1000.0, tokens_per_document=1000.0
    )
    assert choose_documents_per_unit(4096, sample, 2047, 4096, 1) == 2
    per_unit = choose_documents_per_unit(None, sample, 2047, 4096, 1)
    assert per_unit * 1000 * 4096 == pytest.approx(256 << 20, rel=0.02)
    assert choose_documents_per_unit(None, sample, 2047, 4096, 4) == per_unit // 2
    assert choose_documents_per_unit(None, replace(sample, documents=1000), 2047, 4096, 1) == 15
    assert choose_documents_per_unit(None, replace(sample, documents=10), 2047, 4096, 1) == 4
    short = replace(sample, rows_per_document=0.01)
    assert choose_documents_per_unit(None, short, 2047, 4096, 1) == 4 * (4096 // 2047)


def test_no_room(plan: ExtractionPlan, tmp_path: Path) -> None:
    plan.check_room(str(tmp_path / "new" / "store"), 0)
    huge = replace(plan, sample=replace(plan.sample, documents=10**13))
    with pytest.raises(
        UserError, match=r"^out: .*store needs about .* GB more and its disk has .* GB free; choose"
    ):
        huge.check_room(str(tmp_path / "new" / "store"), 0)
    huge.check_room(str(tmp_path / "new" / "store"), huge.bytes)
    huge.check_room("memory://somewhere/store", 0)
    assert not (tmp_path / "new").exists()


def test_calibration_gives_a_rate(plan: ExtractionPlan) -> None:
    threads = torch.get_num_threads()
    rate = calibrate(plan.manifest, Loading(batch_tokens=256, threads=1, device="cpu"), plan.sample.pieces)
    assert rate > 0
    assert torch.get_num_threads() == threads
    assert not worth_calibrating(plan.sample, 256)
    assert worth_calibrating(plan.sample, 32)
