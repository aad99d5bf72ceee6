"""Documents to token ids, for tokenizers of each kind."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dmm_ray.errors import UserError
from dmm_ray.subject import SubjectModel, SubjectSource
from dmm_ray.subject.encoding import ChatRefusedError, Encoded, encode, render_chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]


def build(folder: Path, template: str | None, **special: str) -> Any:
    """A tokenizer with tiny_subject's vocabulary (<s> is 0, </s> 1) that writes ``template`` around a text."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def bos(tiny_subject: Path) -> Any:
    tokenizer = build(tiny_subject, "<s> $A", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def bert(tiny_subject: Path) -> Any:
    return build(tiny_subject, "<s> $A </s>", cls_token="<s>", sep_token="</s>")


@pytest.fixture(scope="module")
def bare(tiny_subject: Path) -> Any:
    """Without BOS, EOS or padding."""
    return build(tiny_subject, None)


def test_special_tokens_stay_at_the_ends(bos: Any, bert: Any, bare: Any) -> None:
    text = "the cat sat on a red mat"
    [plain] = encode(bare, [text], None)
    n = len(plain.ids)
    assert n > 5
    assert plain == Encoded(plain.ids, n, 0)
    assert encode(bos, [text], None) == [Encoded([0, *plain.ids], n + 1, 0)]
    assert encode(bert, [text], None) == [Encoded([0, *plain.ids, 1], n + 2, 1)]
    assert encode(bare, [text], 4) == [Encoded(plain.ids[:4], n, 0)]
    assert encode(bos, [text], 4) == [Encoded([0, *plain.ids[:3]], n + 1, 0)]
    assert encode(bert, [text], 4) == [Encoded([0, *plain.ids[:2], 1], n + 2, 1)]
    assert encode(bert, [text], n + 2) == [Encoded([0, *plain.ids, 1], n + 2, 1)]
    assert encode(bert, [text], 1)[0].ids == [1]


def test_blank_documents_have_no_tokens(bos: Any) -> None:
    cat = encode(bos, ["the cat"], 8)[0]
    assert encode(bos, [], 8) == []
    empty = Encoded([], 0, 0)
    assert encode(bos, ["", "the cat", " \n", [], "the cat"], 8) == [empty, cat, empty, empty, cat]


def test_messages_go_through_the_template(bos: Any) -> None:
    rendered = "<s><user>the cat</s><assistant>a dog</s>"
    expected = bos(rendered, add_special_tokens=False)["input_ids"]
    assert expected.count(0) == 1
    assert encode(bos, [CHAT], None) == [Encoded(expected, len(expected), 0)]
    assert encode(bos, [CHAT, rendered], 6) == [Encoded(expected[:6], len(expected), 0)] * 2
    mixed = encode(bos, ["the cat", CHAT, "a"], None)
    assert mixed == [encode(bos, [document], None)[0] for document in ("the cat", CHAT, "a")]


def test_one_opening_token_only(bos: Any, bert: Any, bare: Any) -> None:
    for tokenizer in (bos, bert):
        assert encode(tokenizer, ["<s>the cat"], None) == encode(tokenizer, ["the cat"], None)
        assert encode(tokenizer, ["<s><s>the"], None)[0].ids[:3] == [
            0,
            0,
            *encode(bare, ["the"], None)[0].ids[:1],
        ]
    assert encode(bare, ["<s>the cat"], None)[0].ids[0] == 0


def test_messages_that_cannot_be_rendered(bos: Any, bare: Any) -> None:
    with pytest.raises(UserError, match=r"^model: .*no chat template.*give documents with text"):
        encode(bare, ["the cat", CHAT], 8)
    with pytest.raises(ChatRefusedError, match=r"^the chat template .*\(no such role\)"):
        encode(bos, [[{"role": "nobody", "content": "x"}]], 8)


@pytest.mark.parametrize("window", [None, 2048])
def test_a_million_tokens(bos: Any, window: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    bos.model_max_length = 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = encode(bos, ["the cat " * 500_000], window)
    assert found.length > 1_000_000
    assert len(found.ids) == (window or found.length)
    assert capfd.readouterr() == ("", "")


def test_the_subjects_tokenize_is_encode(tiny_subject: Path) -> None:
    subject = SubjectModel.from_pretrained(str(tiny_subject), layers=[0])
    texts = ["the cat", "the cat " * 50, ""]
    assert subject.tokenize(texts, 10) == [e.ids for e in encode(subject.tokenizer, texts, 10)]
    assert [len(ids) for ids in subject.tokenize(texts, 10)][1:] == [10, 0]


def test_a_template_that_asks_for_the_day_is_told_the_same_one_every_day(bos: Any) -> None:
    """As Llama 3's do; else tokens, and rows, would be others tomorrow."""
    bos.chat_template = (
        "{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}\n  {{ messages[0].content }}"
    )
    assert render_chat(bos, CHAT) == f"26 Jul 2024, 2024-07-26\n  {CHAT[0]['content']}"


def test_the_hash_covers_the_chat_template(tiny_subject: Path, tmp_path: Path) -> None:
    hashes = []
    for template in (None, TEMPLATE, TEMPLATE + " "):
        folder = Path(shutil.copytree(tiny_subject, tmp_path / str(len(hashes))))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        hashes.append(SubjectSource.resolve(str(folder)).tokenizer_hash)
    assert len(set(hashes)) == 3
    assert hashes[0] == SubjectSource.resolve(str(tiny_subject)).tokenizer_hash


def test_a_vocabulary_without_the_letter_a() -> None:
    """What a vocabulary of bases makes of it is nothing, and of words the unknown token: neither shows what is put
    around a text."""
    letters = Tokenizer(
        models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5, "AC": 6}, [("A", "C")])
    )
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for backend, text, ids in ((letters, "ACGTT", [6, 4, 5, 5]), (words, "the cat sat the", [2, 3, 4, 2])):
        backend.add_special_tokens(["<s>", "</s>"])
        for template, before, after in (("<s> $A", [0], []), ("$A </s>", [], [1]), ("<s> $A </s>", [0], [1])):
            backend.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
            )
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
            [whole], [cut] = encode(tokenizer, [text], None), encode(tokenizer, [text], 3)
            assert whole == Encoded(before + ids + after, len(before + ids + after), len(after))
            assert cut.ids == before + ids[: 3 - len(before + after)] + after


def test_a_tokenizer_of_special_tokens_alone() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match=r"model: the tokenizer of .* produces only special tokens"):
        encode(tokenizer, ["the cat"], None)
