"""Documents and tokenizers at the edges, through the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stores import extract_here, units_here
from texts import WORDS
from tokenizers import Tokenizer, models, processors

from dmm_ray.cli import main
from dmm_ray.errors import CheckFailed, UserError
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.extract import extract
from dmm_ray.extraction.verify import VerifyConfig, verify
from dmm_ray.store.reader import ActivationStore
from dmm_ray.subject.runner import ModelRunner

ENDLESS = 200_000


@pytest.fixture
def plain(tiny_subject: Path, tmp_path: Path) -> Path:
    """A random GPT-2 whose tokenizer has no BOS, no end of text, no padding token."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(2)
    config = transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    shutil.copy(tiny_subject / "tokenizer.json", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"post_processor": None, "added_tokens": []})
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def odd_store(model: Path, texts: list[str], folder: Path, **options: Any) -> ActivationStore:
    """The store of one layer of these documents, made in this process."""
    text = folder / "odd.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    given: dict[str, Any] = {"layers": [0], "dtype": "float32", **options}
    return ActivationStore.open(
        extract_here(model=str(model), text=str(text), out=str(folder / "store"), **given)
    )


@pytest.fixture(scope="module")
def endless(tiny_subject: Path) -> str:
    """A text of a little over ``ENDLESS`` tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_subject)
    words = " ".join(np.random.default_rng(0).choice(WORDS, 10_000)) + " "
    return words * (ENDLESS // (len(tokenizer(words)["input_ids"]) - 2) + 1)


def test_an_endless_document_is_cut(tiny_subject: Path, endless: str, tmp_path: Path) -> None:
    store = odd_store(tiny_subject, ["the cat", endless, "a dog"], tmp_path)
    assert store.document(0, 1).position.tolist() == list(range(1, 64))
    assert len(store.document(0, 2).doc) > 0
    assert store.records[0].long == 1


def test_an_endless_document_is_split(tiny_subject: Path, endless: str, tmp_path: Path) -> None:
    store = odd_store(tiny_subject, ["the cat", endless, "a dog"], tmp_path, long_documents="split")
    position = store.document(0, 1).position
    assert len(position) >= ENDLESS
    np.testing.assert_array_equal(position, np.arange(1, len(position) + 1))
    assert store.statistics(0).count == store.rows == sum(r.tokens for r in store.records) - windows(store)


def windows(store: ActivationStore) -> int:
    """How many times a first token went through the model: once a document, or a window of one."""
    return sum(-(-len(store.document(0, doc).doc) // 63) for doc in range(3))


@pytest.mark.parametrize("keep_first", [False, True])
def test_one_token_documents_with_a_bos(tiny_subject: Path, tmp_path: Path, keep_first: bool) -> None:
    store = odd_store(tiny_subject, ["Q", "", "Z", " "], tmp_path, keep_first=keep_first)
    kept = [0, 1] if keep_first else [1]
    assert [store.document(0, doc).position.tolist() for doc in range(4)] == [kept, [], kept, []]


def test_one_token_documents_without_a_bos(plain: Path, tmp_path: Path) -> None:
    """Position 0 is the text's own token then, and not kept unless asked for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, None, None)
    texts = ["Q", "the cat sat on a mat", "Z"]
    (tmp_path / "all").mkdir()
    store = odd_store(plain, texts, tmp_path)
    whole = odd_store(plain, texts, tmp_path / "all", keep_first=True)
    for doc, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        assert store.document(0, doc).token_id.tolist() == ids[1:]
        assert whole.document(0, doc).token_id.tolist() == ids


def test_a_vocabulary_of_five(tmp_path: Path) -> None:
    """BOS and the letters of DNA: fewer ids than a model is tried out with otherwise."""
    model, letters = tmp_path / "dna", "ACGT"
    tokenizer = Tokenizer(models.BPE({"<s>": 0} | {letter: i for i, letter in enumerate(letters, 1)}, []))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(model)
    torch.manual_seed(3)
    small = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_attention_heads=2)).eval()
    lm.save_pretrained(model)
    texts = ["GATTACA", "C", "ACGT" * 12]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"model": str(model), "text": str(tmp_path / "t.jsonl"), "layers": [0], "dtype": "float32"}
    store = ActivationStore.open(extract_here(**options, out=str(tmp_path / "store")))
    for doc, text in enumerate(texts):
        rows, ids = store.document(0, doc), [0, *(letters.index(letter) + 1 for letter in text)]
        assert rows.token_id.tolist() == ids[1:]
        with torch.no_grad():
            hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(rows.activation, hidden[1:], atol=1e-5, rtol=1e-5)


@pytest.fixture
def poisoned(tiny_subject: Path, tmp_path: Path) -> dict[str, Any]:
    """Options: invalid UTF-8, no field, no JSON, a token that the model does not know; a document a unit."""
    model = shutil.copytree(tiny_subject, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<boom>"])
    tokenizer.save_pretrained(model)
    lines = [b'{"text": "the cat"}', b'{"text": "\xff\xfe"}', b'{"txt": "a dog"}', b'{"text": ']
    lines += [b'{"text": "a red <boom> cat"}', b'{"text": "one town"}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    given = {"model": str(model), "text": str(tmp_path / "t.jsonl"), "out": str(tmp_path / "store")}
    return {**given, "layers": [0], "dtype": "float32", "rows_per_shard": 1, "actors": 1, "cpus_per_actor": 1}


def test_poisoned_documents_within_the_limit_are_listed(poisoned: dict[str, Any]) -> None:
    store = Path(extract_here(**poisoned, max_failed_documents=4))
    figures = json.loads((store / "summary.json").read_text())["figures"]
    assert figures["failed_documents"] == 4
    assert [failed["doc"] for failed in figures["failed"]] == [1, 2, 3, 4]
    for failed, says in zip(
        figures["failed"],
        ("UTF-8", "no field 'text'", "not valid JSON", "its forward pass failed"),
        strict=True,
    ):
        assert says in failed["error"]
    found = ActivationStore.open(str(store))
    assert [doc for doc in range(6) if len(found.document(0, doc).doc)] == [0, 5]


def test_poisoned_documents_over_the_limit_stop_the_job(poisoned: dict[str, Any]) -> None:
    """The scan sees three; the fourth, found by an actor, is one too many."""
    with (
        pytest.raises(
            UserError, match=r"^text: 4 documents failed, the last: .*--max-failed-documents \(now 3\)$"
        ),
        units_here(),
    ):
        extract(ExtractConfig(**poisoned, max_failed_documents=3))
    store = Path(poisoned["out"])
    assert not (store / "summary.json").exists()
    extract_here(**poisoned, max_failed_documents=4)
    assert ActivationStore.open(str(store)).manifest.units == 6


def test_a_fault_in_the_models_code_is_one_line_with_its_document(
    tiny_subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trace lies in the folder until the same command has finished the work, with the bytes of any other run."""
    (tmp_path / "t.txt").write_text("the cat sat\n\na dog\n\na red town\n\none cat\n")
    options = {"model": str(tiny_subject), "text": str(tmp_path / "t.txt"), "layers": [0], "dtype": "float32"}
    store, whole = tmp_path / "store", extract_here(**options, out=str(tmp_path / "whole"), rows_per_shard=1)
    red = transformers.AutoTokenizer.from_pretrained(tiny_subject)("a red town")["input_ids"]
    forward = ModelRunner._run

    def run(self: ModelRunner, **given: Any) -> Any:
        if red in [given["input_ids"][0].tolist()]:
            raise TypeError("unsupported operand\nfor a red town")
        return forward(self, **given)

    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["extract", *flags, "--out", str(store), "--rows-per-shard", "1"]
    monkeypatch.setattr(ModelRunner, "_run", run)
    with units_here(), pytest.raises(SystemExit) as ended:
        main(command)
    monkeypatch.undo()
    assert ended.value.code == 1
    log = store / "errors" / "unit-000002.log"
    cause = "TypeError: unsupported operand for a red town"
    line = f"dmm extract: unit 2, document 2: {cause}; full trace: {log}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert "for a red town" in log.read_text().splitlines()[-2]
    assert "in capture_packed\n    " in log.read_text()
    with pytest.raises(CheckFailed) as unfinished:
        verify(VerifyConfig(store=str(store)))
    assert "unexpected file" not in str(unfinished.value)
    with units_here(), pytest.raises(SystemExit):
        main(command)
    assert not log.parent.exists()
    for path in (p for p in Path(whole).rglob("*") if p.is_file() and p.name != "summary.json"):
        assert (store / path.relative_to(whole)).read_bytes() == path.read_bytes()
