"""Sequences laid end to end against each alone, for every family that can be packed; the others say no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmm_ray.subject import SubjectModel
from dmm_ray.subject.packing import CannotPackError, Pack, packing

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
    assert subject.packable
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
    assert not SubjectModel.from_pretrained(str(make_model(family)), layers=[1]).packable


def test_a_wrong_model_of_attention_fails_the_trial(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that do not start anew: what a model does that ignores ``position_ids``."""
    subject = SubjectModel.from_pretrained(str(make_model("gpt2")), layers=[1])
    monkeypatch.setattr(Pack, "positions", lambda pack: torch.arange(sum(pack.lengths))[None])
    assert not subject.packable


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
        with pytest.raises(CannotPackError, match="mask of its own"):
            packed_attention(Own(), x, x, x, torch.ones(1), is_causal=True)
        with pytest.raises(CannotPackError):
            packed_attention(Own(), x, x, x, None, is_causal=False)
    assert pack.calls == 0
