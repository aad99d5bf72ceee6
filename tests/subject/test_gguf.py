"""Models in GGUF files against the folder that they were made from, and against plain transformers."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dmm_ray import SubjectModel
from dmm_ray.errors import UserError
from dmm_ray.subject.source import SubjectSource

gguf = pytest.importorskip("gguf", reason="needs dmm-ray[gguf]")
TEXTS = ["the cat sat on a red mat", "one big dog", "hills near town, while rain fell!"]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in which GGUF keeps a Llama's queries and keys: pairs of the rotation side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path: Path, folder: Path, kind: str = "F32", arch: str = "llama", tokens: bool = True) -> Path:
    """The Llama in ``folder`` as a GGUF file, its matrices quantised to ``kind``."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    if tokens:
        saved = json.loads((folder / "tokenizer.json").read_text())["model"]
        vocabulary = sorted(saved["vocab"], key=saved["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in vocabulary])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in saved["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(True)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        data = tensor.float().numpy()
        part = name.split(".")[-2]
        if part in heads:
            data = rotated(data, heads[part])
        quantised = getattr(gguf.GGMLQuantizationType, kind if data.ndim == 2 else "F32")
        writer.add_tensor(name, gguf.quantize(data, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's models are unpacked."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DMM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def packed(tiny_subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny subject, unquantised."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_subject)


def test_rows_tokens_and_text_are_those_of_the_folder(packed: Path, tiny_subject: Path) -> None:
    ours, plain = (SubjectModel.from_pretrained(str(m), head=True) for m in (packed, tiny_subject))
    ids = plain.tokenize(TEXTS, 32)
    assert ours.tokenize(TEXTS, 32) == ids
    for layer in (0, 3):
        assert torch.equal(
            ours.capture(*ours.pad(ids), [layer])[layer], plain.capture(*plain.pad(ids), [layer])[layer]
        )
    first, second = (m.generate(ids, max_tokens=6) for m in (ours, plain))
    assert [c.ids for c in first] == [c.ids for c in second]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_those_that_plain_transformers_reads(
    tiny_subject: Path, tmp_path: Path, kind: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_subject, kind)
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32, **options
    )
    source = SubjectSource.resolve(str(path))
    ours = transformers.AutoModelForCausalLM.from_pretrained(source.folder)
    assert ours.dtype == torch.float32
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_it_is_unpacked_once_and_known_by_the_files_hash(packed: Path, cache: Path, tmp_path: Path) -> None:
    first = SubjectSource.resolve(str(packed))
    stamp = (first.folder / "config.json").stat().st_mtime_ns
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(packed.read_bytes())
    second = SubjectSource.resolve(str(moved))
    assert second.folder == first.folder
    assert (second.folder / "config.json").stat().st_mtime_ns == stamp
    assert list(first.file_hashes) == ["tiny.gguf"]
    assert list(first.file_hashes.values()) == list(second.file_hashes.values())
    assert (first.model_id, first.context, first.d) == (str(packed), 64, 32)
    assert {p.name for p in (cache / "gguf").iterdir() if p.is_dir()} == {first.folder.name}


def _resolve(path: str) -> str:
    return str(SubjectSource.resolve(path).folder)


def test_processes_that_ask_at_once_share_one_folder_and_what_a_killed_one_left_goes(
    packed: Path, cache: Path
) -> None:
    digest = next(iter(SubjectSource.resolve(str(packed)).file_hashes.values()))
    folder = cache / "gguf" / digest[:32]
    folder.rename(folder.with_name(f"{folder.name}.tmp-killed"))
    with get_context("spawn").Pool(2) as pool:
        assert set(pool.map(_resolve, [str(packed)] * 2)) == {str(folder)}
    assert not list(folder.parent.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"NOPE" + data[4:], r"is not a GGUF file"),
        (lambda data: data[: len(data) // 2], r"truncated|damaged"),
        (lambda data: data[:-100], r"truncated"),
        (lambda data: data[:64], r"truncated|damaged"),
    ],
)
def test_a_damaged_file_is_refused_and_leaves_nothing(
    packed: Path, cache: Path, tmp_path: Path, change: object, message: str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(packed.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"^model: .*bad\.gguf.*({message})"):
        SubjectSource.resolve(str(bad))
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.name != "gguf"]


def test_what_transformers_cannot_read_is_one_line(tiny_subject: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_subject, arch="mamba7")
    with pytest.raises(
        UserError, match=r"^model: .*other\.gguf: transformers cannot .*; give the model as a folder"
    ):
        SubjectSource.resolve(str(path))
    path = write_gguf(tmp_path / "mute.gguf", tiny_subject, tokens=False)
    with pytest.raises(UserError, match=r"^model: .*mute\.gguf: transformers cannot build its tokenizer"):
        SubjectSource.resolve(str(path))


def test_a_cache_that_cannot_be_written_is_named(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DMM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^DMM_CACHE: .*cannot be kept in .*file"):
        SubjectSource.resolve(str(packed))
    assert os.listdir(tmp_path) == ["file"]
