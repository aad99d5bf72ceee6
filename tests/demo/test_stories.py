"""The story generator: determinism, exact spans, independent labels, agreement, varied openings."""

import itertools
import json
import re
from collections import Counter, defaultdict

import pytest
from scipy.stats import chi2_contingency

from dmm_ray.demo import lexicon
from dmm_ray.demo.grammar import conjugate, parse, with_article
from dmm_ray.demo.stories import ATTRIBUTES, generate, write_corpus
from dmm_ray.errors import UserError

STORIES = list(generate(4000, seed=11))
PRONOUNS = {"female": {"she", "her", "herself"}, "male": {"he", "him", "his", "himself"}}
PLURAL = {"they", "them", "their", "themselves"}
WORLD = {person.name: person for person in lexicon.WORLD}


def texts(story, label):
    return [story.text[s.start : s.end] for s in story.spans if s.label == label]


def test_a_story_depends_on_seed_and_index_alone():
    assert list(generate(50, seed=11)) == STORIES[:50]
    assert STORIES[0].text != next(generate(1, seed=12)).text


def test_json_holds_everything(tmp_path):
    path = write_corpus(tmp_path / "demo.jsonl", 20, seed=11)
    with open(path) as f:
        records = [json.loads(line) for line in f]
    assert records == [json.loads(json.dumps(s.to_json())) for s in STORIES[:20]]
    assert set(records[0]) == {"text", "labels", "spans", "facts"}


def test_spans_hold_the_words_they_are_labelled_with():
    for story in STORIES:
        labels = story.labels
        assert all(0 <= s.start < s.end <= len(story.text) for s in story.spans)
        assert all(labels["animal"] in t or t in lexicon.PET_NAMES for t in texts(story, "animal"))
        assert all(labels["object"] in t for t in texts(story, "object"))
        assert all(labels["place"] in t for t in texts(story, "place"))
        assert set(texts(story, "neighbour")) <= {labels["neighbour"]}
        assert all(t == labels["hero"] or t.lower().startswith("the ") for t in texts(story, "hero"))
        assert labels["hero"] in texts(story, "hero")


def test_sentence_spans_are_whole_sentences():
    for story in STORIES:
        for span in story.spans:
            if span.label in ("harm", "sentiment"):
                assert story.text[span.end - 1] in '.!"'
                assert span.start == 0 or story.text[span.start - 1] == " "
                assert story.text[span.start].isupper() or story.text[span.start] == '"'


def test_harm_is_marked_exactly_where_it_is_told():
    share = sum(s.labels["harm"] != "none" for s in STORIES) / len(STORIES)
    assert 0.12 < share < 0.18
    for story in STORIES:
        assert bool(texts(story, "harm")) == (story.labels["harm"] != "none")


def test_facts_stand_where_they_say_and_the_world_never_changes():
    told = Counter()
    for story in STORIES:
        for fact in story.facts:
            assert story.text[fact.start : fact.end].lower() == fact.object.lower()
            if fact.world:
                assert fact.object == getattr(WORLD[fact.subject], fact.relation)
                told[fact.subject, fact.relation] += 1
    assert len(told) == 64 * 3
    assert min(told.values()) >= 10


def test_world_is_balanced():
    assert len(WORLD) == 64
    for relation in lexicon.RELATIONS:
        assert set(Counter(getattr(p, relation) for p in lexicon.WORLD).values()) <= {2, 4}
    heroes = set(lexicon.FEMALE) | set(lexicon.MALE)
    assert not heroes & set(WORLD)
    assert not set(lexicon.FEMALE) & set(lexicon.MALE)
    assert min(len(lexicon.FEMALE), len(lexicon.MALE)) > 100


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(ATTRIBUTES, 2)))
def test_labels_are_independent(a, b):
    pairs = [
        (s.labels[a], s.labels[b])
        for s in STORIES
        if "none" not in (s.labels[a], s.labels[b]) or "harm" in (a, b)
    ]
    pairs = [(x, y) for x, y in pairs if a == "harm" or b == "harm" or "none" not in (x, y)]
    rows, columns = sorted({x for x, _ in pairs}), sorted({y for _, y in pairs})
    counts = Counter(pairs)
    result = chi2_contingency([[counts[x, y] for y in columns] for x in rows])
    assert result.pvalue > 1e-4


def test_pronouns_agree_with_the_hero():
    for story in STORIES:
        allowed = PLURAL if story.labels["number"] == "plural" else PRONOUNS[story.labels["gender"]]
        assert {t.lower() for t in texts(story, "pronoun")} <= allowed


def test_narration_keeps_its_tense():
    past_only = re.compile(r"\b(was|were|had|did|went|gave|took|began)\b")
    present_only = re.compile(r"\b(is|are|has|does|goes|says|takes|finds)\b")
    for story in STORIES:
        narration = re.sub(r'"[^"]*"', "", story.text)
        wrong = present_only if story.labels["tense"] == "past" else past_only
        assert not wrong.search(narration), (wrong.search(narration), story.text)


def test_verbs_agree_in_number():
    wrong = re.compile(
        r"\b(they|[A-Z]\w+ and [A-Z]\w+) (is|was|has|does|goes)\b|\b(she|he|it) (are|were|have|do|go)\b"
    )
    for story in STORIES:
        assert not wrong.search(story.text), story.text


def test_text_is_clean():
    for story in STORIES:
        text = story.text
        assert not re.search(r"[{}\[\]|_]|  | [.,!?]|\.\.", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiouh]", text), text
        assert text.isascii()
        assert re.fullmatch(r'["A-Z].*[.!"]', text)


def test_lengths_are_mixed():
    words = sorted(len(s.text.split()) for s in STORIES)
    assert words[len(words) // 20] < 45
    assert 70 < words[len(words) // 2] < 110
    assert words[-len(words) // 20] > 110
    assert words[-1] < 200


def test_openings_vary():
    assert len({" ".join(s.text.split()[:12]) for s in STORIES}) > 0.99 * len(STORIES)
    commonest = Counter(s.text.split()[0] for s in STORIES).most_common(1)[0][1]
    assert commonest < 0.1 * len(STORIES)


def test_what_is_introduced_comes_back():
    again = defaultdict(int)
    for story in STORIES:
        for label in ("hero", "animal", "object", "place", "neighbour"):
            again[label] += len(texts(story, label)) > 1
    assert all(again[label] > 0.2 * len(STORIES) for label in again)


def test_fixed_attributes_change_nothing_else():
    plain = list(generate(200, seed=3))
    for value in ("past", "present"):
        told = list(generate(200, seed=3, fixed={"tense": value}))
        assert all(s.labels["tense"] == value for s in told)
        for a, b in zip(plain, told, strict=True):
            assert {**a.labels, "tense": value} == b.labels
            if a.labels["tense"] == value:
                assert a == b
    sad = list(generate(200, seed=3, fixed={"sentiment": "negative"}))
    for a, b in zip(plain, sad, strict=True):
        ending = min(s.start for s in a.spans if s.label == "sentiment")
        assert b.text.startswith(a.text[:ending])


def test_unknown_attributes_are_refused():
    with pytest.raises(UserError, match="no such attribute or value mood=glad"):
        list(generate(1, fixed={"mood": "glad"}))
    with pytest.raises(UserError, match="weather=hail; there are: rain"):
        list(generate(1, fixed={"weather": "hail"}))


@pytest.mark.parametrize(
    ("verb", "past", "present"),
    [
        ("be", "was", "is"),
        ("carry", "carried", "carries"),
        ("stop", "stopped", "stops"),
        ("go", "went", "goes"),
        ("cannot", "could not", "cannot"),
        ("must", "had to", "must"),
        ("fetch", "fetched", "fetches"),
        ("bring", "brought", "brings"),
    ],
)
def test_conjugation(verb, past, present):
    assert conjugate(verb, past=True, plural=False) == past
    assert conjugate(verb, past=False, plural=False) == present


def test_notation():
    template = parse('2:"{I} {am} here," [say] {Hn}.')
    assert template.number == "plural"
    assert template.slots == {"I", "am", "Hn"}
    assert [with_article(w) for w in ("owl", "goat", "honest girl")] == ["an owl", "a goat", "an honest girl"]
