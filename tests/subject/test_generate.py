"""Many prompts at once: each is written as it is alone."""

from __future__ import annotations

import pytest
import torch
from subject.conftest import PROMPT, Make
from subject.families import CAUSAL, CHANGING

from dmm_ray.errors import UserError
from dmm_ray.subject import Generation, Intervention, Site, SubjectModel, TooLongError

PROMPTS = [[0, 5, 16, 27, 38, 49, 50], [0, 7], [0, 8, 9, 10, 11], [0, 100, 101, 102, 103]]


def scale(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Depends on the sequence and the position."""
    return x * (1 + 0.02 * ids[:, 1:] + 0.3 * ids[:, :1])


EDITS = [Intervention(Site(1), scale)]


@pytest.mark.parametrize("family", [*CAUSAL, *CHANGING])
def test_a_batch_is_what_each_prompt_gives_alone(make_model: Make, family: str) -> None:
    model = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    if family == "doge" and not model.generates:
        pytest.skip("transformers before 5.24 go wrong with Doge's cache")
    for edits in ([], EDITS):
        together = model.generate(PROMPTS, edits, max_tokens=6)
        alone = [
            model.generate([prompt], edits, max_tokens=6, ids=[i])[0] for i, prompt in enumerate(PROMPTS)
        ]
        assert together == alone
    _end_at_different_times(model)
    assert model.decoding_trials.drops
    whole = model.token_losses(*model.pad([one.prompt + one.ids for one in together if one.ids]))
    nats = model.continuation_nats(PROMPTS, [one.ids for one in together])
    for row, one, found in zip(whole, together, nats, strict=True):
        own = row[len(one.prompt) - 1 :][: len(one.ids)]
        torch.testing.assert_close(torch.tensor(found), own, rtol=1e-4, atol=1e-4)


def _end_at_different_times(model: SubjectModel) -> None:
    """Sequences leave the batch before the others: drawn tokens, of which every sixth ends a text."""
    prompts = [[0, 5 + i, *range(20, 20 + i)] for i in range(8)]
    stops, model.stop_ids = model.stop_ids, frozenset(range(0, 320, 6))
    drawn = {"max_tokens": 12, "temperature": 3.0, "seed": 1}
    together = model.generate(prompts, EDITS, **drawn)
    alone = [model.generate([prompt], EDITS, ids=[i], **drawn)[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert len({len(one.ids) for one in together}) > 2
    model.stop_ids = stops


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neo", "mpt", "mistral", "qwen3_5"])
def test_each_is_written_to_the_end_of_its_context(make_model: Make, family: str) -> None:
    """Positions, masks and biases of a model may end with its context: padding must not lead beyond it."""
    model = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    assert model.decoding_trials.together
    prompts = [[0, *range(5, 60)], [0, 7], [0, 8, 9], list(range(10, 73))]
    together = model.generate(prompts, max_tokens=30)
    assert together == [model.generate([prompt], max_tokens=30)[0] for prompt in prompts]
    assert all(len(one.ids) == min(30, 64 - len(one.prompt)) or one.finish == "stop" for one in together)


def test_no_edit_sees_padding_or_a_text_that_has_ended(language: SubjectModel) -> None:
    seen: list[tuple[int, int]] = []

    def note(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.extend((sequence, position) for sequence, position in ids.tolist())
        return x

    stopping = SubjectModel.from_pretrained(language.model_id, head=True)
    stopping.stop_ids = frozenset({language.generate(PROMPTS[:1], max_tokens=3)[0].ids[2]})
    for prompt in (True, False):
        seen.clear()
        edit = Intervention(Site(1), note, prompt=prompt)
        found = stopping.generate(PROMPTS, [edit], max_tokens=6, ids=[10, 11, 12, 13])
        assert {one.finish for one in found} == {"stop", "length"}
        expected = []
        for sequence, one in enumerate(found, 10):
            last = len(one.prompt) + len(one.ids) - (one.finish == "length")
            first = 1 if prompt else len(one.prompt) - 1
            expected += [(sequence, position) for position in range(first, last)]
        assert sorted(seen) == expected


def test_a_batch_of_one_is_the_stream(language: SubjectModel) -> None:
    stream = Generation(language, PROMPT, max_tokens=9, temperature=0.8, seed=3)
    ids = [token.id for token in stream]
    [one] = language.generate([PROMPT], max_tokens=9, temperature=0.8, seed=3)
    assert (one.ids, one.text, one.finish) == (ids, stream.text, stream.finish)


def test_draws_are_of_the_seed_and_the_prompt_s_id(language: SubjectModel) -> None:
    prompts = [PROMPT, "the dog", PROMPT]
    found = language.generate(prompts, temperature=1.5, max_tokens=8, seed=1)
    assert found[0].ids != found[2].ids
    again = language.generate(prompts[1:], temperature=1.5, max_tokens=8, seed=1, ids=[1, 2], batch_size=1)
    assert [one.ids for one in again] == [one.ids for one in found[1:]]


def test_each_has_its_temperature(language: SubjectModel) -> None:
    [greedy] = language.generate([PROMPT], max_tokens=8)
    hot, cold = language.generate([PROMPT] * 2, temperature=[1.5, 0], max_tokens=8, seed=2)
    assert cold.ids == greedy.ids
    assert hot.ids == language.generate([PROMPT], temperature=1.5, max_tokens=8, seed=2)[0].ids != greedy.ids
    for bad in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="temperature: "):
            language.generate([PROMPT] * 2, temperature=bad)


def test_draws_follow_the_model_s_distribution(language: SubjectModel) -> None:
    """Of 2,000 first tokens, against their probabilities: chi-squared, the rare ones together."""
    losses = [language.continuation_nats([[0, 5]], [[token]])[0][0] for token in range(320)]
    p = torch.tensor(losses).neg().exp()
    drawn = language.generate([[0, 5]] * 2000, temperature=1.0, max_tokens=1, batch_size=500)
    counts = torch.zeros(320)
    for one in drawn:
        for token in one.ids or language.stop_ids:
            counts[token] += 1
    common = p > 0.004
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = 2000 * torch.cat([p[common], p[~common].sum()[None]])
    statistic = float(((found - expected).square() / expected).sum())
    assert statistic < len(found) + 5 * (2 * len(found)) ** 0.5


def test_a_character_that_ends_unfinished_is_shown(language: SubjectModel) -> None:
    """The last token of all gives the rest; those before it come at once, without text."""
    first, *_ = language.tokenizer("\u65e5", add_special_tokens=False)["input_ids"]
    model = SubjectModel.from_pretrained(language.model_id, head=True)
    always = torch.full((320,), -50.0)
    always[first] = 50.0
    model.runner.model.lm_head.register_forward_hook(lambda _m, _i, logits: always.expand_as(logits))
    tokens = list(Generation(model, PROMPT, max_tokens=3))
    assert [token.text for token in tokens[:2]] == ["", ""]
    assert tokens[2].text
    [whole] = model.generate([PROMPT], max_tokens=3)
    assert whole.text == "".join(token.text for token in tokens)


def test_nan_of_the_model_is_named(language: SubjectModel) -> None:
    model = SubjectModel.from_pretrained(language.model_id, head=True)
    assert model.decoding_trials.together

    def broken(_module: torch.nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        logits[0] = float("nan")
        return logits

    model.runner.model.lm_head.register_forward_hook(broken)
    with pytest.raises(UserError, match="NaN or Inf for the token after sequence 1, position 1"):
        model.generate(PROMPTS)


def test_each_ends_by_itself(language: SubjectModel) -> None:
    plain = language.generate(PROMPTS, max_tokens=1000)
    for one in plain:
        full = len(one.prompt) + len(one.ids) == language.context
        assert one.finish == ("length" if full else "stop")
    assert {one.finish for one in plain} == {"length", "stop"}
    stopping = SubjectModel.from_pretrained(language.model_id, head=True)
    stopping.stop_ids = frozenset({plain[0].ids[2]})
    for one, whole in zip(stopping.generate(PROMPTS, max_tokens=30), plain, strict=True):
        stops = [n for n, token in enumerate(whole.ids[:30]) if token in stopping.stop_ids]
        assert one.ids == whole.ids[: stops[0] if stops else 30]
        assert one.finish == ("stop" if stops else "length")


def test_chats_end_where_the_answer_begins(language: SubjectModel) -> None:
    model = SubjectModel.from_pretrained(language.model_id, head=True)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}cat{% endif %}"
    )
    chat = [{"role": "user", "content": "the"}]
    assert model.prompt_ids(chat) == model.tokenizer("the cat", add_special_tokens=False)["input_ids"]


def test_bad_prompts_are_named(language: SubjectModel) -> None:
    for prompt in ("  ", []):
        with pytest.raises(UserError, match="prompt: it contains no tokens"):
            language.generate([prompt])
    with pytest.raises(UserError, match="prompt: the vocabulary has tokens 0 to 319"):
        language.generate([[0, 320]])
    with pytest.raises(UserError, match="max_tokens: at least 1"):
        language.generate([[0]], max_tokens=0)
    with pytest.raises(UserError, match="ids: expected one for each of the 2 prompts"):
        language.generate([[0], [0]], ids=[1])
    with pytest.raises(TooLongError, match="prompt: fills the model's context"):
        language.generate([[0] * 64])


@pytest.mark.parametrize("prompts", ["the cat", [3, 4, 5]])
def test_one_prompt_that_is_not_in_a_list_is_refused(
    language: SubjectModel, prompts: str | list[int]
) -> None:
    with pytest.raises(UserError, match=r"^prompts: expected a list of prompts"):
        language.generate(prompts)  # type: ignore[arg-type]
