from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from interventions.conftest import PROMPT

from dmm_ray.errors import UserError
from dmm_ray.interventions import Direction, Steering
from dmm_ray.prior import ActivationPrior
from dmm_ray.subject import Generation, SubjectModel, TooLongError

ALONG = Direction("along", torch.arange(32.0) - 15, layer=2)
LAYER, STRENGTH, U, SEED, STEPS = 2, 0.7, 0.4, 5, 3


def written(model: SubjectModel, steering: Steering | None = None, **options: Any) -> list[int]:
    edits = [] if steering is None else [steering.intervention()]
    return [token.id for token in Generation(model, PROMPT, edits, **{"max_tokens": 12, **options})]


def test_without_steering_it_is_plain_greedy_generation(language: SubjectModel) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(language.model_id)
    ids = torch.tensor([language.prompt_ids(PROMPT)])
    expected = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert written(language) == expected.tolist()


@pytest.mark.parametrize("u", [None, U])
def test_each_new_token_s_activation_is_moved_then_projected(
    language: SubjectModel, prior: ActivationPrior, u: float | None
) -> None:
    """Against one pass of the plain model over all tokens, edited by the definition."""
    new = written(language, Steering(prior, ALONG, STRENGTH, u, STEPS, seed=SEED))
    before = language.prompt_ids(PROMPT)
    row = prior.layers.index(LAYER)
    norm = (prior.normalizer.mean[row].square() + prior.normalizer.var[row]).sum().sqrt()

    def edit(_module: Any, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        edited = hidden.clone()
        for position in range(len(before) - 1, hidden.shape[1]):
            x = hidden[0, position] + STRENGTH * norm * ALONG.vector
            if u is not None:
                at = torch.tensor([[0, position]])
                x = prior.denoise(x[None], u=u, steps=STEPS, layer=LAYER, ids=at, seed=SEED)[0]
            edited[0, position] = x
        return edited

    plain = transformers.AutoModelForCausalLM.from_pretrained(language.model_id)
    plain.model.layers[LAYER].register_forward_hook(edit)
    with torch.no_grad():
        logits = plain(torch.tensor([before + new])).logits[0, len(before) - 1 : -1]
    assert logits.argmax(1).tolist() == new
    assert written(language) != new


def test_noise_is_of_the_seed_and_the_position(prior: ActivationPrior) -> None:
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    four, five = torch.tensor([[0, 4]]), torch.tensor([[0, 5]])
    one, two = (Steering(prior, ALONG, 0.3, U, STEPS, seed=seed) for seed in (1, 2))
    assert torch.equal(one(x, four), one(x, four))
    assert not torch.allclose(one(x, four), one(x, five))
    assert not torch.allclose(one(x, four), two(x, four))


def test_the_norm_is_that_of_the_rows(prior: ActivationPrior) -> None:
    assert Steering(prior, None, layer=1).norm == pytest.approx((32 * (0.01 + 0.25)) ** 0.5, rel=1e-5)
    assert Steering(prior, None, layer=2).norm == pytest.approx((32 * (0.25 + 0.75)) ** 0.5, rel=1e-5)


def test_what_does_not_fit_is_refused(language: SubjectModel, prior: ActivationPrior) -> None:
    with pytest.raises(UserError, match="belongs to layer 2, not 1"):
        Steering(prior, ALONG, layer=1)
    with pytest.raises(UserError, match="3 numbers"):
        Steering(prior, Direction("short", torch.ones(3)), layer=1)
    with pytest.raises(UserError, match="layer: this prior models 1, 2"):
        Steering(prior, None)
    with pytest.raises(TooLongError, match="prompt: fills"):
        Generation(language, language.tokenizer.decode([9] * 63))
    with pytest.raises(UserError, match="temperature"):
        Generation(language, PROMPT, temperature=-1)


def test_draws_are_of_the_seed(language: SubjectModel) -> None:
    drawn = [written(language, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for least in (1e-6, 1e-310):
        assert written(language, temperature=least, seed=3) == written(language)


def test_it_ends_with_the_text_the_limit_or_the_context(language: SubjectModel) -> None:
    whole = Generation(language, PROMPT, max_tokens=1000)
    room = language.context - len(language.prompt_ids(PROMPT))
    assert len(list(whole)) == room
    assert whole.finish == "length"
    stopping = SubjectModel.from_pretrained(language.model_id, head=True)
    stopping.stop_ids = frozenset({whole.tokens[3].id})
    stopped = Generation(stopping, PROMPT, max_tokens=8)
    ids = [token.id for token in stopped]
    assert ids == list(itertools.takewhile(lambda i: i not in stopping.stop_ids, written(language)))
    assert stopped.finish == "stop"


def test_text_is_that_of_all_tokens(language: SubjectModel) -> None:
    """Random weights write bytes that are no whole characters, too."""
    for seed in range(5):
        generation = Generation(language, PROMPT, max_tokens=50, temperature=3.0, seed=seed)
        ids = [token.id for token in generation]
        said = [*language.prompt_ids(PROMPT), *ids]
        whole = language.tokenizer.decode(said, skip_special_tokens=True).removeprefix(PROMPT)
        assert whole == generation.text
        assert len(generation.nats()) == len(ids)
