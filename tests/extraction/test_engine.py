"""One unit through the engine, without Ray: stored rows against a plain forward of the whole model."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dmm_ray.errors import UserError
from dmm_ray.extraction import extract as extract_module
from dmm_ray.extraction.config import ExtractConfig
from dmm_ray.extraction.engine import Engine, ExtractionTask, Loading
from dmm_ray.extraction.extract import choose_compute_dtype, make_manifest
from dmm_ray.extraction.plan import CorpusSample
from dmm_ray.store.manifest import Record
from dmm_ray.store.reader import ActivationStore, Rows
from dmm_ray.text.corpus import Corpus
from dmm_ray.units.resume import finish
from dmm_ray.units.unit import Unit, unit_at

LENGTHS = [3, 40, 0, 1, 90, 17, 17, 2]


@pytest.fixture
def mixed_text(tmp_path: Path) -> Path:
    """Documents of 0 to 90 words, so from none to more tokens than the window."""
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        "".join(json.dumps({"text": " ".join(["the red cat"] * n)[: 6 * n]}) + "\n" for n in LENGTHS)
    )
    return path


@pytest.fixture
def gpt2(tiny_subject: Path, tmp_path: Path) -> Path:
    """A random GPT-2 whose tokenizer adds no BOS and knows no padding token."""
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for file in tiny_subject.glob("*token*"):
        shutil.copy(file, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    return folder


def make_engine(out: Path, batch_tokens: int = 100, **options: Any) -> tuple[Engine, list[Unit]]:
    """An engine in this process and its units."""
    config = ExtractConfig(out=str(out), **options)
    source = config.subject.resolve()
    corpus = Corpus.scan(config.uris)
    window = config.window or source.context
    sample = CorpusSample.draw(corpus, window, config.kept, config.seed, source.tokenizer)
    manifest = make_manifest(
        config, choose_compute_dtype(config, str(out)), source, 3, corpus, window, sample
    )
    engine = Engine(
        ExtractionTask(str(out), manifest, config.max_failed_documents, Loading(batch_tokens, 1, "cpu")),
        corpus,
    )
    per_unit = manifest.documents_per_unit
    return engine, [unit_at(u, corpus.n_documents, per_unit) for u in range(manifest.units)]


def run_all(engine: Engine, units: list[Unit], threads: int = 1) -> tuple[ActivationStore, list[Record]]:
    """The finished store, extracted by calls from some threads."""
    with ThreadPoolExecutor(threads) as pool:
        records = list(pool.map(engine.extract, units))
    out, manifest = Path(engine.task.out), engine.task.manifest
    (out / "manifest.json").write_text(manifest.model_dump_json())
    finish(str(out), manifest)
    return ActivationStore.open(str(out)), records


def extract_all(out: Path, batch_tokens: int = 100, **options: Any) -> tuple[ActivationStore, list[Record]]:
    """The finished store of these options."""
    return run_all(*make_engine(out, batch_tokens, **options))


def all_rows(store: ActivationStore, layer: int) -> Rows:
    parts = [store.read(layer, group) for group in store.row_groups(layer)]
    return Rows(
        torch.cat([p.activation for p in parts]),
        *(np.concatenate(c) for c in list(zip(*parts, strict=True))[1:]),
    )


def plain_rows(
    folder: Path, text: Path, layer: int, window: int, skip: int
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Each document alone through the whole model: the rows, and (doc, position, token) of each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows, keys = [torch.empty(0, 32)], []
    for doc, line in enumerate(text.read_text().splitlines()):
        content = json.loads(line)["text"]
        ids = tokenizer(content)["input_ids"][:window] if content else []
        if len(ids) > skip:
            with torch.no_grad():
                hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            rows.append(hidden[skip:])
            keys += [(doc, position, ids[position]) for position in range(skip, len(ids))]
    return torch.cat(rows), keys


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("keep_first", "batch_tokens"), [(False, 100), (False, 1), (True, 4096)])
def test_rows_equal_a_plain_forward(
    tiny_subject: Path,
    gpt2: Path,
    mixed_text: Path,
    tmp_path: Path,
    family: str,
    keep_first: bool,
    batch_tokens: int,
) -> None:
    folder = tiny_subject if family == "llama" else gpt2
    store, records = extract_all(
        tmp_path / "out", batch_tokens, model=str(folder), text=str(mixed_text), layers=[0, 1],
        dtype="float32", window=48, keep_first=keep_first, rows_per_shard=150,
    )  # fmt: skip
    assert store.manifest.units == 3
    for layer in (0, 1):
        expected, keys = plain_rows(folder, mixed_text, layer, 48, 0 if keep_first else 1)
        rows = all_rows(store, layer)
        assert (
            list(zip(rows.doc.tolist(), rows.position.tolist(), rows.token_id.tolist(), strict=True)) == keys
        )
        torch.testing.assert_close(rows.activation, expected, atol=1e-5, rtol=1e-5)
    assert sum(r.long for r in records) == 2
    assert sum(r.rows for r in records) == len(keys)
    assert [r.documents for r in records] == [3, 3, 2]


def test_bfloat16_is_the_rounded_float32(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_subject), "text": str(mixed_text), "layers": [2]}
    exact, _ = extract_all(tmp_path / "a", dtype="float32", **options)
    rounded, _ = extract_all(tmp_path / "b", dtype="bfloat16", compute_dtype="float32", **options)
    low, _ = extract_all(tmp_path / "c", compute_dtype="bfloat16", **options)
    assert low.manifest.compute_dtype == low.manifest.dtype == "bfloat16"
    x = all_rows(exact, 2).activation
    assert torch.equal(all_rows(rounded, 2).activation, x.bfloat16())
    y = all_rows(low, 2).activation
    assert y.dtype == torch.bfloat16
    assert float((y.float() - x).norm() / x.norm()) < 0.02


def test_values_that_are_not_finite_are_kept_and_counted(
    tiny_subject: Path, mixed_text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_subject, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "layers.1.mlp.down_proj" in n)
    weights[name][0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store, records = extract_all(
        tmp_path / "out", model=str(folder), text=str(mixed_text), layers=[0, 1], dtype="float32"
    )
    assert sum(r.nonfinite["0"] for r in records) == 0
    assert sum(r.nonfinite["1"] for r in records) == store.rows
    assert not torch.isfinite(all_rows(store, 1).activation).all()
    assert store.statistics(1).count == 0
    assert store.statistics(0).count == store.rows


def test_rows_that_are_not_finite_are_excluded_on_request(tiny_subject: Path, tmp_path: Path) -> None:
    """The embedding of one token is infinite: rows that see it are left out in every layer, the others stay."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_subject, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer("Q")["input_ids"][-1]] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "the cat sat"}\n{"text": "the red cat Q sat on"}\n{"text": "a big dog"}\n')
    options: dict[str, Any] = {"model": str(folder), "text": str(text), "layers": [0, 1], "dtype": "float32"}
    kept, _ = extract_all(tmp_path / "kept", **options)
    store, records = extract_all(tmp_path / "left_out", exclude=["nonfinite"], **options)
    finite = torch.isfinite(all_rows(kept, 1).activation).all(1)
    assert records[0].excluded == int((~finite).sum()) == records[0].nonfinite["1"] > 0
    for layer in (0, 1):
        whole, rows = all_rows(kept, layer), all_rows(store, layer)
        assert torch.equal(rows.activation, whole.activation[finite])
        np.testing.assert_array_equal(rows.position, whole.position[finite.numpy()])
        np.testing.assert_array_equal(rows.token_id, whole.token_id[finite.numpy()])


def test_outliers_are_counted_and_excluded_on_request(tiny_subject: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_subject, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer("Q")["input_ids"][-1]] *= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "the cat sat on the mat"}\n{"text": "the red cat Q sat on"}\n')
    options: dict[str, Any] = {"model": str(folder), "text": str(text), "layers": [0], "dtype": "float32"}
    _, records = extract_all(tmp_path / "kept", **options)
    assert records[0].outliers == {"0": 1}
    store, records = extract_all(tmp_path / "left_out", exclude=["outliers"], **options)
    assert records[0].excluded == 1
    assert tokenizer("Q")["input_ids"][-1] not in all_rows(store, 0).token_id


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_rows_equal_packed_ones(
    tiny_subject: Path, gpt2: Path, mixed_text: Path, tmp_path: Path, family: str
) -> None:
    folder = tiny_subject if family == "llama" else gpt2
    options: dict[str, Any] = {
        "model": str(folder),
        "text": str(mixed_text),
        "layers": [1],
        "dtype": "float32",
    }
    packed, records = extract_all(tmp_path / "packed", **options)
    assert sum(r.padding for r in records) == 0
    engine, units = make_engine(tmp_path / "padded", **options)
    assert engine.forward.batching == "packed"
    engine.forward.batching = "padded"
    padded, _ = run_all(engine, units)
    torch.testing.assert_close(
        all_rows(padded, 1).activation, all_rows(packed, 1).activation, atol=1e-5, rtol=1e-5
    )


def test_threads_write_the_same_bytes(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_subject), "text": str(mixed_text), "layers": [1], "window": 48, "rows_per_shard": 50,
    }  # fmt: skip
    one, _ = extract_all(tmp_path / "one", **options)
    three, _ = run_all(*make_engine(tmp_path / "three", **options), threads=3)
    assert one.manifest.units == 8
    assert one.records == three.records


def test_a_finished_unit_is_not_computed_again(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    engine, (unit, *_) = make_engine(
        tmp_path / "out", model=str(tiny_subject), text=str(mixed_text), layers=[1]
    )
    record = engine.extract(unit)
    (tmp_path / "out" / "layer_01" / "shard-000000.parquet").unlink()
    assert engine.extract(unit) == record
    assert not (tmp_path / "out" / "layer_01" / "shard-000000.parquet").exists()


def test_a_unit_that_a_straggler_of_another_run_left_is_made_again(
    tiny_subject: Path, mixed_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": str(tiny_subject), "text": str(mixed_text), "layers": [1]}
    straggler, (unit, *_) = make_engine(tmp_path / "out", window=20, **options)
    left = straggler.extract(unit)
    store, (record, *_) = run_all(*make_engine(tmp_path / "out", window=48, **options))
    assert record.rows > left.rows
    assert store.rows == record.rows
    straggler.extract(unit)
    with pytest.raises(UserError, match=r"shards/000000.json: its configuration is not the manifest's"):
        ActivationStore.open(store.uri)


def test_split_documents_have_a_window_of_context(
    tiny_subject: Path, mixed_text: Path, tmp_path: Path
) -> None:
    """Rows of a split document are those of each window alone, under a BOS of its own."""
    store, _ = extract_all(
        tmp_path / "out", model=str(tiny_subject), text=str(mixed_text), layers=[1], dtype="float32", window=20,
        long_documents="split",
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_subject)
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny_subject).eval()
    ids = tokenizer(json.loads(mixed_text.read_text().splitlines()[4])["text"])["input_ids"]
    rows = store.document(1, 4)
    assert rows.position.tolist() == list(range(1, len(ids)))
    assert rows.token_id.tolist() == ids[1:]
    assert len(ids) > 60
    for low in range(1, len(ids), 19):
        with torch.no_grad():
            window = torch.tensor([[ids[0], *ids[low : low + 19]]])
            hidden = lm(window, output_hidden_states=True).hidden_states[2][0, 1:]
        torch.testing.assert_close(rows.activation[low - 1 : low + 18], hidden, atol=1e-5, rtol=1e-5)


def test_tokens_per_document(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_subject), "text": str(mixed_text), "layers": [1], "dtype": "float32", "window": 48,
    }  # fmt: skip
    everything, _ = extract_all(tmp_path / "all", **options)
    for tokens in ("last", 3):
        store, _ = extract_all(tmp_path / str(tokens), tokens_per_doc=tokens, **options)
        for doc in range(8):
            whole, some = everything.document(1, doc), store.document(1, doc)
            assert len(some.doc) == min(len(whole.doc), 1 if tokens == "last" else 3)
            inside = np.isin(whole.position, some.position)
            expected = whole.activation[torch.from_numpy(inside)]
            torch.testing.assert_close(some.activation, expected, atol=1e-5, rtol=1e-5)
            assert tokens != "last" or not len(some.doc) or some.position[0] == whole.position[-1]


def test_covariance_of_the_corpus(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    store, _ = extract_all(
        tmp_path / "out", model=str(tiny_subject), text=str(mixed_text), layers=[1], dtype="float32", window=48,
        rows_per_shard=100, covariance=True,
    )  # fmt: skip
    x = all_rows(store, 1).activation.double().numpy()
    assert store.manifest.units > 2
    np.testing.assert_allclose(store.statistics(1).covariance, np.cov(x.T, bias=True), atol=1e-6 * x.var())


def test_a_document_whose_forward_fails_is_skipped(tiny_subject: Path, tmp_path: Path) -> None:
    """A token that the model has no embedding for: its document fails, its batch mates do not."""
    folder = shutil.copytree(tiny_subject, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<boom>"])
    tokenizer.save_pretrained(folder)
    text = tmp_path / "t.jsonl"
    lines = ["the cat sat", "a red <boom> cat", "a big dog", "one town"]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options: dict[str, Any] = {"model": str(folder), "text": str(text), "layers": [0, 1], "dtype": "float32"}
    store, records = extract_all(tmp_path / "out", max_failed_documents=1, **options)
    assert records[0].failed[0][0] == 1
    assert "document 1: its forward pass failed: IndexError" in records[0].failed[0][1]
    text.write_text("".join(json.dumps({"text": line.replace("<boom>", "")}) + "\n" for line in lines))
    fixed, _ = extract_all(tmp_path / "fixed", **options)
    for doc in (0, 2, 3):
        torch.testing.assert_close(store.document(1, doc).activation, fixed.document(1, doc).activation)
    assert len(store.document(1, 1).doc) == 0
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.raises(
        UserError, match=r"text: document 1: its forward pass failed: .*skip up to N such documents"
    ):
        extract_all(tmp_path / "other", **options)


def test_chats_go_through_the_template_with_one_bos(tiny_subject: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_subject, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role + ' ' + m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    text = tmp_path / "t.jsonl"
    chats = [[{"role": role, "content": "the cat"}] for role in ("user", "system", "town")]
    text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options: dict[str, Any] = {"model": str(folder), "text": str(text), "layers": [1], "dtype": "float32"}
    store, records = extract_all(tmp_path / "out", keep_first=True, max_failed_documents=1, **options)
    assert records[0].failed[0][0] == 1
    assert "document 1: the chat template of" in records[0].failed[0][1]
    assert store.document(1, 0).token_id.tolist() == tokenizer("user the cat")["input_ids"]
    assert store.document(1, 2).token_id.tolist() == tokenizer("town the cat")["input_ids"]
    bare = {**options, "model": str(tiny_subject)}
    with pytest.raises(UserError, match="has no chat template"):
        extract_all(tmp_path / "bare", **bare)


def test_encoders_keep_neither_cls_nor_sep(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    """A random BERT: its attention sees padding unless masked, its texts end in [SEP] even when they are cut."""
    from tokenizers import processors

    folder = tmp_path / "bert"
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_subject)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="<s>", sep_token="</s>"
    ).save_pretrained(folder)
    options: dict[str, Any] = {
        "model": str(folder),
        "text": str(mixed_text),
        "layers": [1],
        "dtype": "float32",
    }
    store, records = extract_all(tmp_path / "out", window=24, **options)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    for doc, line in enumerate(mixed_text.read_text().splitlines()):
        content = json.loads(line)["text"]
        if not content:
            continue
        ids = tokenizer.backend_tokenizer.encode(content).ids
        ids = ids if len(ids) <= 24 else [*ids[:23], 1]
        with torch.no_grad():
            hidden = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        rows = store.document(1, doc)
        assert rows.position.tolist() == list(range(1, len(ids) - 1))
        torch.testing.assert_close(rows.activation, hidden[1:-1], atol=1e-5, rtol=1e-5)
    assert sum(r.padding for r in records) <= 0.05 * sum(r.tokens + r.padding for r in records)
    whole, _ = extract_all(tmp_path / "whole", window=24, keep_first=True, keep_special=True, **options)
    assert whole.document(1, 0).token_id[[0, -1]].tolist() == [0, 1]


def test_failed_documents_within_the_limit_are_recorded(tiny_subject: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "the cat sat"}\nbroken\n{"text": "a big dog"}\n')
    options: dict[str, Any] = {
        "model": str(tiny_subject),
        "text": str(text),
        "layers": [0],
        "dtype": "float32",
    }
    store, records = extract_all(tmp_path / "out", max_failed_documents=1, **options)
    assert [doc for doc, _ in records[0].failed] == [1]
    assert set(all_rows(store, 0).doc) == {0, 2}
    with pytest.raises(
        UserError, match=r"t.jsonl: line 2: not valid JSON; fix it, or skip .*--max-failed-documents"
    ):
        extract_all(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_computation_follows_the_machine_and_a_resume_keeps_it_on_another(
    tiny_subject: Path, mixed_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    options: dict[str, Any] = {"model": str(tiny_subject), "text": str(mixed_text), "layers": [2]}
    config = ExtractConfig(out=str(tmp_path / "a"), **options)
    monkeypatch.setattr(extract_module, "actors_have_fast_bfloat16", lambda pool: fast)
    store, _ = extract_all(tmp_path / "a", **options)
    chosen = "bfloat16" if fast else "float32"
    assert (store.manifest.dtype, store.manifest.compute_dtype) == ("bfloat16", chosen)
    monkeypatch.setattr(extract_module, "actors_have_fast_bfloat16", lambda pool: not fast)
    assert choose_compute_dtype(config, config.out) == chosen
    other = config.model_copy(update={"compute_dtype": "float32" if fast else "bfloat16"})
    assert choose_compute_dtype(other, config.out) == other.compute_dtype  # which the manifest then refuses
    wide = ExtractConfig(out=str(tmp_path / "none"), dtype="float32", **options)
    assert choose_compute_dtype(wide, wide.out) == "float32"
