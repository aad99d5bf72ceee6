"""Sequences that share a forward pass give the rows that each gives alone in a fresh model, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from subject.families import CHANGING, CONFIGS, ORIGINAL, ROPE
from subject.test_families import BLOCKS, whole_model
from torch import nn

from dmm_ray.extraction.forward import Forward
from dmm_ray.extraction.pieces import DocumentPiece
from dmm_ray.subject import Intervention, Site, SubjectModel
from dmm_ray.subject.packing import CannotPackError, Pack, packing
from dmm_ray.subject.state import ModuleState

LENGTHS = [60, 40, 21, 20, 17, 16, 5, 3, 1, 1]
PACKED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
]
PADDED = ["gemma2", "bloom", "mpt", "bert", "roberta", "gpt_neo"]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 300, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_equal_those_of_each_sequence_alone(
    make_model: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dmm_ray.subject.packing.SHARED_LENGTH", 50
    )  # the longest by itself, others share calls
    subject = SubjectModel.from_pretrained(str(make_model(family)), layers=[0, 2])
    assert subject.batching(64) == "packed"
    packed = subject.capture_packed(sequences(), [0, 2])
    for layer, rows in packed.items():
        alone = [subject.capture(*subject.pad([ids]), [layer])[layer][0] for ids in sequences()]
        torch.testing.assert_close(rows, torch.cat(alone), atol=2e-5, rtol=1e-4)
    again = subject.capture(*subject.pad([sequences()[2]]), [2])[2][
        0
    ]  # padded forwards still work afterwards
    torch.testing.assert_close(packed[2][100:121], again, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", PADDED)
def test_models_that_cannot_be_packed(make_model: Callable[[str], Path], family: str) -> None:
    assert SubjectModel.from_pretrained(str(make_model(family)), layers=[1]).batching(64) == "padded"


def test_a_wrong_model_of_attention_fails_the_trial(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that do not start anew: what a model does that ignores ``position_ids``."""
    subject = SubjectModel.from_pretrained(str(make_model("gpt2")), layers=[1])
    monkeypatch.setattr(Pack, "positions", lambda pack: torch.arange(sum(pack.lengths))[None])
    assert subject.batching(64) != "packed"


def test_a_failed_forward_restores_the_models_own_attention(make_model: Callable[[str], Path]) -> None:
    subject = SubjectModel.from_pretrained(str(make_model("llama")), layers=[0])
    before = subject.capture(*subject.pad([[1, 2, 3]]), [0])[0]
    with pytest.raises(IndexError):
        subject.capture_packed([[1, 10**6]], [0])
    torch.testing.assert_close(subject.capture(*subject.pad([[1, 2, 3]]), [0])[0], before, atol=0, rtol=0)


def test_attention_of_its_own_is_noticed() -> None:
    class Own(nn.Module):
        pass

    with packing(Own(), [2, 1], torch.device("cpu")) as pack:
        assert pack.positions().tolist() == [[0, 1, 0]]
        from dmm_ray.subject.packing import packed_attention

        x = torch.zeros(1, 2, 3, 4)
        with pytest.raises(CannotPackError, match="softcap"):
            packed_attention(Own(), x, x, x, None, is_causal=True, softcap=30.0)
        with pytest.raises(CannotPackError, match="its own mask"):
            packed_attention(Own(), x, x, x, torch.ones(1), is_causal=True)
        with pytest.raises(CannotPackError):
            packed_attention(Own(), x, x, x, None, is_causal=False)
    assert pack.calls == 0


def alone(folder: Path, family: str, sequences: list[list[int]], layer: int) -> list[torch.Tensor]:
    """The layer's rows (t, d) of each sequence by itself, in a model that has seen no other, without our code."""
    found = []
    for ids in sequences:
        lm, seen = whole_model(folder, family), []

        def keep(_module, _inputs, out, seen=seen):
            seen.append(out[0] if isinstance(out, tuple) else out)

        lm.get_submodule(BLOCKS.get(family, "model.layers"))[layer].register_forward_hook(keep)
        with torch.no_grad():
            lm(input_ids=torch.tensor([ids]))
        found.append(seen[0][0])
    return found


@pytest.mark.parametrize("family", [*CONFIGS, *CHANGING, *ROPE])
def test_a_row_depends_on_nothing_but_its_document(make_model: Callable[[str], Path], family: str) -> None:
    """Whatever shares its pass, and whatever the same process has seen before."""
    folder = make_model(family)
    subject = SubjectModel.from_pretrained(str(folder), layers=[2])
    longest = min(60, max(subject.context, 60 if family == "llama_dynamic" else 0))
    rng = np.random.default_rng(3)
    lengths = [longest, 23, 25, 7, longest, 24, 40, 2, 12]
    ids = [rng.integers(2, 290, n).tolist() for n in lengths]
    expected = alone(folder, family, ids, 2)
    forward = Forward(subject, [2], torch.float32, batch_tokens=110, longest=longest)
    assert (forward.batching == "alone") == (family in CHANGING)
    pieces = [
        DocumentPiece(doc, tokens, np.arange(len(tokens)), np.arange(len(tokens)))
        for doc, tokens in enumerate(ids)
    ]
    for chosen in (range(len(ids)), range(len(ids) - 1, -1, -1)):
        rows = forward([pieces[i] for i in chosen]).rows[2]
        torch.testing.assert_close(rows, torch.cat([expected[i] for i in chosen]), atol=3e-5, rtol=2e-4)
    captured = subject.capture(*subject.pad(ids), [2])[2]
    for x, y in zip(captured, expected, strict=True):
        torch.testing.assert_close(x[: len(y)], y, atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize("family", CHANGING)
def test_losses_depend_on_nothing_but_the_document(make_model: Callable[[str], Path], family: str) -> None:
    folder = make_model(family)
    subject = SubjectModel.from_pretrained(str(folder), head=True)
    ids = [list(range(2, 2 + n)) for n in (50, ORIGINAL - 2, 9)]
    batch = subject.pad(ids)
    losses = subject.token_losses(*batch)
    edited = subject.token_losses(*batch, [Intervention(Site(1), lambda x, ids: x)])
    changed = subject.token_losses(*batch, [Intervention(Site(1), lambda x, ids: x.flip(-1))])
    for row, tokens in enumerate(ids):
        one = torch.tensor([tokens])
        with torch.no_grad():
            logits = whole_model(folder, family)(input_ids=one).logits[0]
        own = torch.nn.functional.cross_entropy(logits[:-1], one[0, 1:], reduction="none")
        for found in (losses, edited):
            torch.testing.assert_close(found[row, : len(tokens) - 1], own, atol=3e-5, rtol=2e-4)
            assert torch.isnan(found[row, len(tokens) - 1 :]).all()
        assert not torch.allclose(changed[row, : len(tokens) - 1], own, atol=1e-3)


def test_what_a_pass_leaves_in_a_module_is_put_back_and_weights_are_not_copied() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.longest = 4
            self.register_buffer("written", torch.ones(3), persistent=False)
            self.register_buffer("replaced", torch.ones(3), persistent=False)
            self.register_buffer("quantised", torch.ones(3, dtype=torch.uint8))

    module = Remembers()
    state = ModuleState(module)
    assert [sorted(buffers) for _, buffers, _ in state._saved] == [["replaced", "written"]]
    for _ in range(2):
        module.longest = 9
        module.written.mul_(5)
        module.replaced = torch.zeros(7)
        state.restore()
        assert module.longest == 4
        assert torch.equal(module.written, torch.ones(3))
        assert torch.equal(module.replaced, torch.ones(3))
