"""One unit through the engine, without Ray: stored rows against a plain forward of the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dmm_ray.activations.corpus import Corpus
from dmm_ray.activations.engine import Engine, Task
from dmm_ray.activations.extract import ExtractConfig, finish, make_manifest
from dmm_ray.activations.manifest import Record
from dmm_ray.activations.store import ActivationStore, Rows
from dmm_ray.activations.units import unit_at
from dmm_ray.errors import UserError
from dmm_ray.subject import SubjectSource

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


def extract_all(out: Path, batch_tokens: int = 100, **options: Any) -> tuple[ActivationStore, list[Record]]:
    """Every unit by one engine in this process."""
    config = ExtractConfig(out=str(out), **options)
    source = SubjectSource.resolve(config.model)
    corpus = Corpus.scan(config.uris)
    manifest = make_manifest(config, source, 3, corpus, config.window or source.context)
    engine = Engine(
        Task(str(out), manifest, batch_tokens, config.max_failed_documents, 1, "cpu", False), corpus
    )
    per_unit = manifest.documents_per_unit
    records = [engine.extract(unit_at(u, corpus.n_documents, per_unit)) for u in range(manifest.units)]
    (out / "manifest.json").write_text(manifest.model_dump_json())
    finish(str(out), manifest)
    return ActivationStore.open(str(out)), records


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
    assert sum(r.cut for r in records) == 2
    assert sum(r.rows for r in records) == len(keys)
    assert [r.documents for r in records] == [3, 3, 2]


def test_bfloat16_is_the_rounded_float32(tiny_subject: Path, mixed_text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_subject), "text": str(mixed_text), "layers": [2]}
    exact, _ = extract_all(tmp_path / "a", dtype="float32", **options)
    rounded, _ = extract_all(tmp_path / "b", dtype="bfloat16", compute_dtype="float32", **options)
    low, _ = extract_all(tmp_path / "c", **options)
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
        UserError, match=r"t.jsonl: line 2: not valid JSON; mend it, or skip .*--max-failed-documents"
    ):
        extract_all(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
