"""Sites are where they are said to be, by plain hooks on plain transformers; edits reach what they should alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject.conftest import Make
from subject.families import CAUSAL
from subject.test_families import whole_model

from dmm_ray.errors import UserError
from dmm_ray.subject import Intervention, LanguageModel, Site, SubjectModel

IDS = [[0, 5, 16, 27, 38, 49], [0, 7, 9]]
LAYER, HEADS = 1, 4
PROJECTIONS = {
    "llama": "layers.{}.self_attn.o_proj",
    "qwen2": "layers.{}.self_attn.o_proj",
    "gemma2": "layers.{}.self_attn.o_proj",
    "gpt2": "h.{}.attn.c_proj",
    "gpt_neox": "layers.{}.attention.dense",
    "opt": "decoder.layers.{}.self_attn.out_proj",
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
    zeroed = [Intervention(Site(LAYER, "head", head), zero, require_effect=True) for head in range(HEADS)]
    batch = subject.pad(IDS[:1])
    losses = torch.nn.functional.cross_entropy(expected[0, :-1].float(), batch[0][0, 1:], reduction="none")
    torch.testing.assert_close(subject.token_losses(*batch, zeroed)[0], losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_mlp_adds_its_output_to_the_stream(make_model: Make, family: str) -> None:
    subject = SubjectModel.from_pretrained(str(make_model(family)), layers=[LAYER])
    site = Site(LAYER, "mlp")
    mlp = reads(subject, site)
    plain = reads(subject, Site(LAYER))
    without = reads(subject, Site(LAYER), [Intervention(site, zero, first=True)])
    ratio = (plain - without)[0] / mlp[0]  # 1, or the model's constant for its residuals
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-2, atol=1e-2)
    back = reads(subject, Site(LAYER), [Intervention(site, lambda x, ids: mlp[ids[:, 0], ids[:, 1]])])
    assert torch.equal(back[0], plain[0])


def test_patching_back_changes_nothing_and_another_s_something(language: LanguageModel) -> None:
    batch = language.pad(IDS)
    plain = language.token_losses(*batch)
    for site in (Site(LAYER), Site(LAYER, "mlp"), Site(LAYER, "head", 2)):
        own = language.capture(*batch, [site])[site]
        back = Intervention(site, lambda x, ids, own=own: own[ids[:, 0], ids[:, 1]])
        assert torch.equal(language.token_losses(*batch, [back]).nan_to_num(), plain.nan_to_num())
        with pytest.raises(UserError, match=f"{site}: it changed no activation"):
            language.token_losses(*batch, [Intervention(site, back.edit, require_effect=True)])
        other = Intervention(
            site, lambda x, ids, own=own: own[1 - ids[:, 0], ids[:, 1] % 3], require_effect=True
        )
        assert not torch.allclose(language.token_losses(*batch, [other]).nan_to_num(), plain.nan_to_num())


def test_edits_at_one_site_follow_each_other(language: LanguageModel) -> None:
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


def test_what_is_wrong_is_named(language: LanguageModel) -> None:
    def broken(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x.masked_fill((ids == torch.tensor([1, 2])).all(1)[:, None], float("nan"))

    with pytest.raises(UserError, match="layer 1: the edit gave NaN or Inf at sequence 1, position 2"):
        reads(language, Site(0), [Intervention(Site(1), broken)])
    with pytest.raises(UserError, match=r"layer 1: the edit gave \(7, 31\) for \(7, 32\)"):
        reads(language, Site(0), [Intervention(Site(1), lambda x, ids: x[:, 1:])])
    for site, match in {
        Site(9): "no layer 9; choose from 0 to 3",
        Site(0, "head", 4): "heads 0 to 3",
        Site(0, "head"): "heads 0 to 3",
    }.items():
        with pytest.raises(UserError, match=match):
            reads(language, site)
