"""Every family against plain transformers: the whole model, with hooks on its blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from subject.families import CAUSAL, CONFIGS, ENCODERS, MULTIMODAL

from dmm_ray.errors import UserError
from dmm_ray.subject import Intervention, Site, SubjectModel, SubjectSource

TEXTS = ["the cat", "one big dog run to town while rain fell", "a", "the cat sat on a red mat and saw " * 3]
LAYERS = [0, 2]
BLOCKS = {
    "gpt2": "transformer.h", "gpt_neo": "transformer.h", "bloom": "transformer.h", "mpt": "transformer.blocks",
    "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer", "distilbert": "distilbert.transformer.layer",
} | dict.fromkeys(MULTIMODAL, "model.language_model.layers")  # fmt: skip


def whole_model(folder: Path, family: str) -> Any:
    """The model as its users load it."""
    auto = transformers.AutoModelForCausalLM
    if family in MULTIMODAL:
        auto = transformers.AutoModelForImageTextToText
    elif family in ENCODERS:
        auto = transformers.AutoModelForMaskedLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def block_outputs(lm: Any, family: str, tokens: list[int]) -> dict[int, torch.Tensor]:
    """Output (t, d) of every block of the whole model for one sequence."""
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    blocks = lm.get_submodule(BLOCKS.get(family, "model.layers"))
    handles = [block.register_forward_hook(keep(k)) for k, block in enumerate(blocks)]
    with torch.no_grad():
        lm(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    return seen


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_outputs_are_the_whole_models(make_model: Callable[[str], Path], family: str) -> None:
    """Alone, in a batch padded on the right, and padded on the left."""
    folder = make_model(family)
    subject = SubjectModel.from_pretrained(str(folder), layers=LAYERS)
    assert (subject.n_layers, subject.d, subject.bidirectional) == (4, 32, family in ENCODERS)
    lm = whole_model(folder, family)
    ids = subject.tokenize(TEXTS, 40)
    expected = [block_outputs(lm, family, tokens) for tokens in ids]
    batch = subject.capture(*subject.pad(ids), LAYERS)
    input_ids, mask = subject.pad(ids)
    shifts = [input_ids.shape[1] - len(tokens) for tokens in ids]
    turned = [torch.stack([row.roll(n) for row, n in zip(t, shifts, strict=True)]) for t in (input_ids, mask)]
    left = subject.capture(turned[0].masked_fill(turned[1] == 0, 5), turned[1], LAYERS)
    for row, tokens in enumerate(ids):
        single = subject.capture(*subject.pad([tokens]), LAYERS)
        for layer in LAYERS:
            near(single[layer][0], expected[row][layer])
            near(batch[layer][row, : len(tokens)], expected[row][layer])
            near(left[layer][row, shifts[row] :], expected[row][layer])


def test_only_what_runs_is_loaded(make_model: Callable[[str], Path], family: str) -> None:
    subject = SubjectModel.from_pretrained(str(make_model(family)), layers=[1])
    names = [name for name, _ in subject.runner.model.named_parameters()]
    assert len(subject.runner.blocks) == 2
    assert not any(part in name for name in names for part in ("head", "vision", "visual", "pooler", "cls."))


@pytest.mark.parametrize("family", [*CAUSAL, *MULTIMODAL], indirect=True)
def test_losses_are_the_whole_models(make_model: Callable[[str], Path], family: str) -> None:
    folder = make_model(family)
    subject = SubjectModel.from_pretrained(str(folder), head=True)
    lm = whole_model(folder, family)
    ids = subject.tokenize(TEXTS, 40)
    losses = subject.token_losses(*subject.pad(ids))
    edited = subject.token_losses(*subject.pad(ids), [Intervention(Site(1), lambda x, ids: x)])
    near(edited.nan_to_num(), losses.nan_to_num())
    for row, tokens in enumerate(ids):
        one = torch.tensor([tokens])
        with torch.no_grad():
            logits = lm(input_ids=one).logits[0]
        own = torch.nn.functional.cross_entropy(logits[:-1].float(), one[0, 1:], reduction="none")
        near(losses[row, : len(tokens) - 1], own)
        assert torch.isnan(losses[row, len(tokens) - 1 :]).all()


@pytest.mark.parametrize("family", ENCODERS, indirect=True)
def test_encoders_predict_no_next_token(make_model: Callable[[str], Path], family: str) -> None:
    subject = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    with pytest.raises(UserError, match="is an encoder, which predicts no next tokens"):
        subject.token_losses(*subject.pad([[0, 5, 6]]))


def test_context(make_model: Callable[[str], Path]) -> None:
    assert SubjectSource.resolve(str(make_model("bert"))).context == 64
    assert SubjectSource.resolve(str(make_model("roberta"))).context == 64 - 1 - 1
    assert SubjectSource.resolve(str(make_model("mpt"))).context == 64
    assert SubjectSource.resolve(str(make_model("bloom"))).context == 2048
    subject = SubjectModel.from_pretrained(str(make_model("roberta")), layers=[0])
    longest = [5] * subject.context
    assert subject.capture(*subject.pad([longest]), [0])[0].shape == (1, 62, 32)


@pytest.mark.parametrize("family", ["llama", "gemma3"], indirect=True)
def test_block_path_overrides(make_model: Callable[[str], Path], family: str) -> None:
    folder = str(make_model(family))
    path = BLOCKS.get(family, "model.layers")
    subject = SubjectModel.from_pretrained(folder, layers=[1], block_path=path)
    assert subject.capture(*subject.pad([[0, 5, 6]]), [1])[1].shape == (1, 3, 32)
    for wrong in ("wrong.path", "model.vision_tower.vision_model.encoder.layers", "lm_head"):
        with pytest.raises(UserError, match=rf"block_path: .*'{wrong}'.*{path}") as error:
            SubjectSource.resolve(folder).check([1], wrong)
        assert "\n" not in str(error.value)


def test_blocks_that_cannot_be_found(tmp_path: Path) -> None:
    """XLM keeps attentions and feed-forward layers in lists of their own: it has no blocks."""
    transformers.XLMConfig(vocab_size=32, emb_dim=16, n_layers=2, n_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"XLMWithLMHeadModel is an unknown architecture.*--block-path transf"
    ):
        SubjectSource.resolve(str(tmp_path)).check([0])
