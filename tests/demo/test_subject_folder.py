"""The embedded subject: loads without a hub, is small, matches its model card, and writes stories that end."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmm_ray.demo
from dmm_ray.demo.stories import generate

FOLDER = Path(dmm_ray.demo.__file__).parent / "subject"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def card():
    """The first number of every row of the card's table of figures."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+)%? \|$", (FOLDER / "README.md").read_text(), re.M)
    return {name: float(value) for name, value in rows}


def story_losses(model, tokenizer, text):
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:256]])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


def test_folder_is_small_and_complete():
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_tokenizer_puts_bos_first_and_loses_nothing(tokenizer):
    assert tokenizer.is_fast
    for story in generate(50, seed=5):
        ids = tokenizer(story.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == story.text
    odd = "Ünïcode, emoji 🙂 and\n\nlines"
    assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd


def test_model_is_a_tied_llama(model, tokenizer):
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 256
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_loss_on_new_stories_is_the_cards(model, tokenizer, card):
    losses = torch.cat([story_losses(model, tokenizer, story.text) for story in generate(150, seed=77)])
    stated = card["loss on 1,000 new stories, nats/token"]
    assert losses.mean().item() == pytest.approx(stated, abs=0.1)
    assert 0.8 < stated < 1.8
    assert card["the unigram's loss on them, nats/token"] > 3 * stated


def test_card_meets_what_the_demo_needs(card):
    assert card["rows whose whole prefix is seen (see below)"] < 10
    assert card["world facts ranked first where a story first tells them"] > 20


def test_sampled_stories_end(model, tokenizer):
    torch.manual_seed(0)
    start = torch.full((12, 1), tokenizer.bos_token_id)
    told = model.generate(start, attention_mask=torch.ones_like(start))
    assert (told == tokenizer.eos_token_id).any(1).sum() >= 10
    for ids in told:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.isascii()
        assert len(text.split()) > 5


def test_harm_costs_no_more_than_the_rest(model, tokenizer):
    harm, rest = [], []
    for story in generate(60, seed=78, fixed={"harm": "theft"}):
        losses = story_losses(model, tokenizer, story.text)
        spans = [s for s in story.spans if s.label == "harm"]
        offsets = tokenizer(story.text, return_offsets_mapping=True)["offset_mapping"][1:]
        for (a, b), loss in zip(offsets, losses.tolist(), strict=False):
            inside = any(a >= s.start - 1 and b <= s.end for s in spans)
            (harm if inside else rest).append(loss)
    assert sum(harm) / len(harm) < 1.5 * sum(rest) / len(rest)
