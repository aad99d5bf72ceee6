"""Many prompts at once: each is written as it is alone."""

from __future__ import annotations

import pytest
import torch
from subject.conftest import PROMPT, Make
from subject.families import CAUSAL, CHANGING

from dmm_ray.errors import UserError
from dmm_ray.subject import Generation, Intervention, LanguageModel, Site, TooLongError

PROMPTS = [[0, 5, 16, 27, 38, 49, 50], [0, 7], [0, 8, 9, 10, 11], [0, 100, 101, 102, 103]]


def scale(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Depends on the sequence and the position."""
    return x * (1 + 0.02 * ids[:, 1:] + 0.3 * ids[:, :1])


EDITS = [Intervention(Site(1), scale, require_effect=True)]


@pytest.mark.parametrize("family", [*CAUSAL, *CHANGING])
def test_a_batch_is_what_each_prompt_gives_alone(make_model: Make, family: str) -> None:
    model = LanguageModel.load(str(make_model(family)))
    if family == "doge" and not model.generates:
        pytest.skip("transformers before 5.24 go wrong with Doge's cache")
    for edits in ([], EDITS):
        together = model.generate(PROMPTS, edits, max_tokens=6)
        alone = [
            model.generate([prompt], edits, max_tokens=6, ids=[i])[0] for i, prompt in enumerate(PROMPTS)
        ]
        assert together == alone
    whole = model.token_losses(*model.pad([one.prompt + one.ids for one in together if one.ids]))
    nats = model.continuation_nats(PROMPTS, [one.ids for one in together])
    for row, one, found in zip(whole, together, nats, strict=True):
        own = row[len(one.prompt) - 1 :][: len(one.ids)]
        torch.testing.assert_close(torch.tensor(found), own, rtol=1e-4, atol=1e-4)


def test_most_families_share_passes(make_model: Make) -> None:
    assert LanguageModel.load(str(make_model("llama"))).generates_together
    assert LanguageModel.load(str(make_model("gpt2"))).generates_together


def test_a_batch_of_one_is_the_stream(language: LanguageModel) -> None:
    stream = Generation(language, PROMPT, max_tokens=9, temperature=0.8, seed=3)
    ids = [token.id for token in stream]
    [one] = language.generate([PROMPT], max_tokens=9, temperature=0.8, seed=3)
    assert (one.ids, one.text, one.finish) == (ids, stream.text, stream.finish)


def test_draws_are_of_the_seed_and_the_prompt_s_id(language: LanguageModel) -> None:
    prompts = [PROMPT, "the dog", PROMPT]
    found = language.generate(prompts, temperature=1.5, max_tokens=8, seed=1)
    assert found[0].ids != found[2].ids
    again = language.generate(prompts[1:], temperature=1.5, max_tokens=8, seed=1, ids=[1, 2], batch_size=1)
    assert [one.ids for one in again] == [one.ids for one in found[1:]]


def test_each_ends_by_itself(language: LanguageModel) -> None:
    plain = language.generate(PROMPTS, max_tokens=1000)
    for one in plain:
        full = len(one.prompt) + len(one.ids) == language.context
        assert one.finish == ("length" if full else "stop")
    assert {one.finish for one in plain} == {"length", "stop"}
    stopping = LanguageModel.load(language.model_id)
    stopping.stop_ids = frozenset({plain[0].ids[2]})
    for one, whole in zip(stopping.generate(PROMPTS, max_tokens=30), plain, strict=True):
        stops = [n for n, token in enumerate(whole.ids[:30]) if token in stopping.stop_ids]
        assert one.ids == whole.ids[: stops[0] if stops else 30]
        assert one.finish == ("stop" if stops else "length")


def test_chats_end_where_the_answer_begins(language: LanguageModel) -> None:
    model = LanguageModel.load(language.model_id)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}cat{% endif %}"
    )
    chat = [{"role": "user", "content": "the"}]
    assert model.ids_of(chat) == model.tokenizer("the cat", add_special_tokens=False)["input_ids"]


def test_bad_prompts_are_named(language: LanguageModel) -> None:
    for prompt in ("  ", []):
        with pytest.raises(UserError, match="prompt: it holds no tokens"):
            language.generate([prompt])
    with pytest.raises(TooLongError, match="prompt: fills the model's context"):
        language.generate([[0] * 64])
