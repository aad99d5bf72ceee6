from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from subject.conftest import PROMPT, Make
from subject.families import CAUSAL

from dmm_ray.errors import UserError
from dmm_ray.subject import Generation, Intervention, Site, SubjectModel, TooLongError
from dmm_ray.subject.decoding import Decoding
from dmm_ray.subject.intervention import Interventions

LAYER = 1


@pytest.mark.parametrize("family", CAUSAL)
def test_steps_with_a_cache_are_one_whole_pass(family: str, make_model: Make) -> None:
    model = SubjectModel.from_pretrained(str(make_model(family)), head=True)
    ids, known = [5 + 7 * i % 300 for i in range(14)], 4

    def edit(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * at[:, 1:])

    edits = [Intervention(Site(LAYER), edit)]
    decoding = Decoding(model.runner, [ids[:known]], active=Interventions(edits))
    found = [decoding.advance(), *(decoding.advance([token]) for token in ids[known:])]
    losses = model.token_losses(*model.pad([ids]), edits)[0, known - 1 :]
    expected = [-row[0].log_softmax(0)[token] for row, token in zip(found[:-1], ids[known:], strict=True)]
    torch.testing.assert_close(torch.stack(expected), losses, rtol=1e-4, atol=1e-4)


def test_a_text_is_read_as_the_subject_reads_it(language: SubjectModel, tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[LAYER])
    reading = language.read(PROMPT, LAYER)
    ids = subject.tokenize([PROMPT], 64)
    assert [piece.id for piece in reading.pieces] == ids[0]
    torch.testing.assert_close(reading.rows, subject.capture(*subject.pad(ids), [LAYER])[LAYER][0])


@pytest.mark.parametrize(
    "text", ["the cat", " a  b\n\tc ", "h\u00e9llo \u65e5\u672c \U0001f600!", "<s> the cat"]
)
def test_pieces_cover_the_text(language: SubjectModel, text: str) -> None:
    first, *rest = language.pieces(text)
    assert first.text == "<s>"
    assert first.id == language.tokenizer.bos_token_id
    assert len(rest) == len(language.tokenize([text], 64)[0]) - 1
    covered = {i for piece in rest for i in range(piece.start, piece.end)}
    assert not any(not text[i].isspace() for i in range(first.end, len(text)) if i not in covered)
    assert all(piece.text == text[piece.start : piece.end] for piece in rest if piece.end > piece.start)
    assert all(a.start <= b.start for a, b in itertools.pairwise(rest))


def test_texts_without_tokens_or_with_too_many_are_refused(language: SubjectModel) -> None:
    with pytest.raises(UserError, match="no tokens"):
        language.read(" \n", LAYER)
    with pytest.raises(TooLongError, match="context of 64"):
        language.read("cat " * 70, LAYER)


def test_nats_are_the_token_losses(language: SubjectModel) -> None:
    ids = language.prompt_ids("the cat sat on a red mat")
    losses = language.token_losses(*language.pad([ids]))[0, 2:]
    torch.testing.assert_close(torch.tensor(language.continuation_nats([ids[:3]], [ids[3:]])[0]), losses)
    assert language.continuation_nats([ids, ids[:2]], [[], ids[2:4]])[0] == []


def test_the_lens_is_norm_and_unembedding(language: SubjectModel, tiny_subject: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_subject)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.lm_head(plain.model.norm(rows))
    torch.testing.assert_close(language.lens(rows), expected)
    with pytest.raises(UserError, match="activations: row 1 is too large"):
        language.lens(torch.stack([rows[0], torch.full((32,), 3e38)]))


def test_an_encoder_is_read_but_generates_nothing(make_model: Make) -> None:
    model = SubjectModel.from_pretrained(str(make_model("bert")), head=True)
    assert model.read(PROMPT, LAYER).rows.shape[1] == 32
    with pytest.raises(UserError, match="encoder"):
        model.require_generation()


def test_token_texts_name_what_decoding_hides(language: SubjectModel) -> None:
    assert language.token_text(0) == "<s>"
    part = language.prompt_ids("\u65e5")[1]
    assert "\ufffd" not in language.token_text(part)
    assert language.token_text(language.prompt_ids("the cat")[-1]) == " cat"


class Renamed(torch.nn.Module):
    """A model whose cache has a name that no version of transformers has given it."""

    def __init__(self, inner: transformers.PreTrainedModel, forgets: bool = False) -> None:
        super().__init__()
        self.inner, self.config, self.forgets = inner, inner.config, forgets
        self.generation_config = inner.generation_config

    def forward(self, input_ids, use_cache=None, memory=None, **options):
        known = {} if memory is None or self.forgets else {self.name: memory}
        out = self.inner(input_ids=input_ids, use_cache=use_cache, **known, **options)
        self.name = next((key for key, value in out.items() if isinstance(value, transformers.Cache)), "")
        renamed = {"memory" if key == self.name else key: value for key, value in out.items()}
        return type("Output", (dict,), {"logits": out.logits})(renamed)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()


def test_a_cache_of_any_name_is_continued_from(tiny_subject: Path) -> None:
    plain, renamed = (
        SubjectModel.from_pretrained(str(tiny_subject), head=True),
        SubjectModel.from_pretrained(str(tiny_subject), head=True),
    )
    renamed.runner.model = Renamed(renamed.runner.model)
    assert plain.generates
    assert renamed.generates
    first, second = (
        [token.id for token in Generation(model, PROMPT, max_tokens=8)] for model in (plain, renamed)
    )
    assert first == second != []


def test_a_model_that_forgets_its_cache_is_refused(tiny_subject: Path) -> None:
    model = SubjectModel.from_pretrained(str(tiny_subject), head=True)
    model.runner.model = Renamed(model.runner.model, forgets=True)
    assert not model.generates
    with pytest.raises(UserError, match="cannot predict from a key-value cache"):
        model.require_generation()
