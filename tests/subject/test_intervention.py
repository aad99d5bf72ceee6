"""Sites are where they are said to be, by plain hooks on plain transformers; edits reach what they should alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from subject.conftest import Make
from subject.families import CAUSAL
from subject.test_families import BLOCKS, whole_model

from dmm_ray.errors import UserError
from dmm_ray.subject import Intervention, Site, SubjectModel

IDS = [[0, 5, 16, 27, 38, 49], [0, 7, 9]]
LAYER, HEADS = 1, 4
PROJECTIONS = {
    "llama": "layers.{}.self_attn.o_proj",
    "qwen2": "layers.{}.self_attn.o_proj",
    "gemma2": "layers.{}.self_attn.o_proj",
    "gpt2": "h.{}.attn.c_proj",
    "gpt_neox": "layers.{}.attention.dense",
    "opt": "decoder.layers.{}.self_attn.out_proj",
    "gpt_neo": "h.{}.attn.attention.out_proj",
    "bloom": "h.{}.self_attention.dense",
    "mixtral": "layers.{}.self_attn.o_proj",
}


def reads(subject: SubjectModel, site: Site, edits: list[Intervention] | None = None) -> torch.Tensor:
    return subject.capture(*subject.pad(IDS), [site], edits or [])[site]


def zero(x: torch.Tensor, _ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_heads_are_slices_of_what_the_projection_reads(make_model: Make, family: str) -> None:
    folder = make_model(family)
    subject = SubjectModel.from_pretrained(str(folder), head=True)
    lm, seen = whole_model(folder, family), list[torch.Tensor]()
    projection = lm.base_model.get_submodule(PROJECTIONS[family].format(LAYER))

    def zero_all_but_the_first_token(_module: Any, inputs: Any) -> Any:
        seen.append(inputs[0])
        return (torch.cat([inputs[0][:, :1], torch.zeros_like(inputs[0][:, 1:])], dim=1), *inputs[1:])

    projection.register_forward_pre_hook(zero_all_but_the_first_token)
    with torch.no_grad():
        expected = lm(input_ids=torch.tensor(IDS[:1])).logits
    width = seen[0].shape[-1] // HEADS
    for head in range(HEADS):
        found = reads(subject, Site(LAYER, "head", head))[0]
        torch.testing.assert_close(found, seen[0][0, :, head * width : (head + 1) * width])
    zeroed = [Intervention(Site(LAYER, "head", head), zero) for head in range(HEADS)]
    batch = subject.pad(IDS[:1])
    losses = torch.nn.functional.cross_entropy(expected[0, :-1].float(), batch[0][0, 1:], reduction="none")
    found = subject.token_losses(*batch, zeroed, require_effect=True)
    torch.testing.assert_close(found[0], losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_mlp_s_output_is_what_is_added_to_the_stream(make_model: Make, family: str) -> None:
    """By plain hooks on the plain model: the block's output less the output that the block has without it."""
    folder = make_model(family)
    mlp = reads(SubjectModel.from_pretrained(str(folder), layers=[LAYER]), Site(LAYER, "mlp"))[0]
    lm, seen = whole_model(folder, family), list[torch.Tensor]()
    block = lm.get_submodule(BLOCKS.get(family, "model.layers"))[LAYER]
    block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        lm(input_ids=torch.tensor(IDS[:1]))
        without_mlp(block)
        lm(input_ids=torch.tensor(IDS[:1]))
    plain, without = seen
    torch.testing.assert_close((plain - without)[0], mlp, rtol=1e-3, atol=1e-4)
    assert float(without.norm()) > 0.1 * float(plain.norm())


def without_mlp(block: torch.nn.Module) -> None:
    """Have the last layer of the block's MLP, or of all its experts, give zeros."""
    last = ("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h")
    found = [
        parameter
        for name, parameter in block.named_parameters()
        if "attn" not in name and "attention" not in name and any(part in last for part in name.split("."))
    ]
    assert found
    for parameter in found:
        parameter.zero_()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "bloom"])
def test_patching_back_changes_nothing_and_another_s_something(make_model: Make, family: str) -> None:
    subject = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    batch = subject.pad(IDS)
    plain = subject.token_losses(*batch).nan_to_num()
    for site in (Site(LAYER), Site(LAYER, "mlp"), Site(LAYER, "head", 2)):
        own = subject.capture(*batch, [site])[site]
        back = Intervention(site, lambda x, ids, own=own: own[ids[:, 0], ids[:, 1]])
        assert torch.equal(subject.token_losses(*batch, [back]).nan_to_num(), plain)
        for call in (subject.token_losses, partial(subject.capture, sites=[site])):
            with pytest.raises(UserError, match=f"{site}: it changed none of the 7 activations"):
                call(*batch, interventions=[back], require_effect=True)
        with pytest.raises(UserError, match=f"{site}: it changed none of the"):
            subject.generate(IDS, [Intervention(site, lambda x, ids: x)], max_tokens=2, require_effect=True)
        other = Intervention(site, lambda x, ids, own=own: own[1 - ids[:, 0], ids[:, 1] % 3])
        assert not torch.allclose(subject.token_losses(*batch, [other]).nan_to_num(), plain)


def test_blocks_that_add_nothing_are_refused(make_model: Make) -> None:
    """BERT's blocks end in a norm; Qwen 3.5's linear attention has other heads, or none."""
    subject = SubjectModel.from_pretrained(str(make_model("bert")), layers=[LAYER])
    with pytest.raises(UserError, match="mlp: no module of BertLayer has an output that is added"):
        reads(subject, Site(LAYER, "mlp"))
    with pytest.raises(UserError, match="head: no output projection of an attention with 4 heads"):
        reads(subject, Site(LAYER, "head", 0))


def test_an_mlp_before_a_norm_is_not_what_is_added(tiny_subject: Path) -> None:
    """The norm's weights may all be alike: the MLP's output then is added, at another size in each row."""
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[LAYER])
    block = subject.runner.blocks[LAYER]
    block.forward = normed(block)
    with pytest.raises(UserError, match="mlp: no module of LlamaDecoderLayer has an output"):
        reads(subject, Site(LAYER, "mlp"))


def normed(block: Any) -> Any:
    """A forward pass of the block with a norm after the MLP, under no module's name."""

    def forward(hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        hidden = hidden + block.self_attn(hidden_states=block.input_layernorm(hidden), **options)[0]
        out = block.mlp(block.post_attention_layernorm(hidden))
        return hidden + torch.nn.functional.rms_norm(out, out.shape[-1:])

    return forward


def test_edits_at_one_site_follow_each_other(language: SubjectModel) -> None:
    site = Site(LAYER)
    add = Intervention(site, lambda x, ids: x + 1)
    double = Intervention(site, lambda x, ids: 2 * x)
    plain = reads(language, site)
    found = reads(language, site, [add, double])
    torch.testing.assert_close(found[0, 1:], 2 * (plain[0, 1:] + 1))
    assert torch.equal(found[:, 0], plain[:, 0])
    assert torch.equal(found[1, 3:], plain[1, 3:])  # padding
    first = reads(language, site, [Intervention(site, add.edit, first=True)])
    torch.testing.assert_close(first[:, 0], plain[:, 0] + 1)


def test_what_is_wrong_is_named(language: SubjectModel) -> None:
    def broken(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x.masked_fill((ids == torch.tensor([1, 2])).all(1)[:, None], float("nan"))

    def check(edit: Any, match: str) -> None:
        with pytest.raises(UserError, match=match):
            reads(language, Site(0), [Intervention(Site(1), edit)])

    too_large = (
        r"layer 1: the edit returned NaN, Inf or numbers too large for the model \(float32\) at sequence"
    )
    check(broken, f"{too_large} 1, position 2")
    check(lambda x, ids: torch.full_like(x, 3e38), f"{too_large} 0, position 1")
    first = "the first at sequence 0, position 1"
    check(lambda x, ids: x[:, 1:], rf"returned shape \(7, 31\) for 7 .* \(7, 32\), {first}")
    check(lambda x, ids: None, f"returned NoneType for 7 .* {first}")
    for site, match in {
        Site(9): "no layer 9; choose from 0 to 3",
        Site(0, "head", 4): "heads 0 to 3",
        Site(0, "head"): "head: required for part 'head'",
        Site(0, "mlp", 1): "head: .* allowed for no other",
        Site(0, "attention"): "part: expected residual, mlp or head",  # type: ignore[arg-type]
    }.items():
        with pytest.raises(UserError, match=match):
            reads(language, site)
