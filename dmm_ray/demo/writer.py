"""Writes a demo story sentence by sentence, recording the exact character span of everything labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from dmm_ray.demo import lexicon
from dmm_ray.demo.grammar import FIRST_PERSON, PRONOUNS, conjugate, parse, with_article

PRONOUN_SHARE = 0.7
NOUN_SHARE = {False: 0.1, True: 0.4}
# word list -> the list that qualifies its words, and how often
QUALIFIED = {"food": ("taste", 0.3), "colour": ("shade", 0.25)}
MEANWHILE_SHARE = 0.2
_SUBJECTS = ("{S}", "{N}", "{Nn} ", "{the.pet}", "{V}")


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (exclusive) of a story's text, and their label."""

    start: int
    end: int
    label: str


class Fact(NamedTuple):
    """``subject`` ``relation`` ``object``; ``start`` and ``end`` delimit the mention of the object.

    ``world`` distinguishes the fixed facts of the world, the same in every story, from those of this story alone.
    """

    subject: str
    relation: str
    object: str
    start: int
    end: int
    world: bool


@dataclass(frozen=True)
class StoryPlan:
    """What a story is about, before any word is chosen. ``heroes`` holds one name or two."""

    heroes: tuple[str, ...]
    gender: str
    tense: str
    place: str
    weather: str
    animal: str
    coat: str
    pet_name: str
    item: str
    item_adjective: str
    town: str
    villain: tuple[str, str]
    neighbour: lexicon.Resident

    @property
    def plural(self) -> bool:
        """Whether the hero is a pair."""
        return len(self.heroes) == 2

    @property
    def hero(self) -> str:
        """The hero's name, or the two names joined by "and"."""
        return " and ".join(self.heroes)


@dataclass
class StoryWriter:
    """The text written so far with its spans and facts, and what the reader already knows."""

    plan: StoryPlan
    rng: Random
    text: str = ""
    spans: list[Span] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pronouns = PRONOUNS[self.plan.gender, self.plan.plural]
        self._speech = FIRST_PERSON[self.plan.plural]
        self._neighbour_pronouns = PRONOUNS[self.plan.neighbour.gender, False]
        self._known: set[str] = set()
        self._used: set[str] = set()
        self._last: dict[str, str] = {}
        self._before: set[str] = set()
        self._persons: set[str] = set()
        self._capital = True

    def sentence(
        self, templates: Sequence[str], label: str = "", without: str = "", linked: bool = False
    ) -> None:
        """Write a fitting template that was not used yet and does not mention ``without`` ("obj", "pet").

        ``label`` names a span over the whole sentence; ``linked`` allows a linking phrase before it.
        """
        fitting = [t for t in templates if t not in self._used and self._fits(t, without)]
        if not fitting:
            return
        template = self.rng.choice(fitting)
        self._used.add(template)
        if self.text:
            self.text += " "
        self._before, self._persons, self._capital = self._persons, set(), True
        start = len(self.text)
        if linked and template.startswith(_SUBJECTS) and self.rng.random() < MEANWHILE_SHARE:
            self._write("{meanwhile}, ")
        self._write(template)
        if label:
            self.spans.append(Span(start, len(self.text), label))

    def _fits(self, template: str, without: str) -> bool:
        parsed = parse(template)
        if without and any(slot.endswith(without) for slot in parsed.slots):
            return False
        if parsed.number and (parsed.number == "plural") != self.plan.plural:
            return False
        return not any(f"a.{what}" in parsed.slots and what in self._known for what in ("obj", "pet"))

    def _write(self, template: str) -> None:
        for part in parse(template).parts:
            if part.kind == "text":
                self._put(part.value)
            elif part.kind == "verb":
                plural = self.plan.plural if not part.option else part.option == "p"
                self._put(conjugate(part.value, self.plan.tense == "past", plural))
            else:
                self._slot(part.value)

    def _put(self, words: str, label: str = "") -> int:
        """Append ``words``, capitalised at the start of a sentence, and return the offset where they begin."""
        if self._capital and (at := next((i for i, c in enumerate(words) if c.isalpha()), None)) is not None:
            words, self._capital = words[:at] + words[at].upper() + words[at + 1 :], False
        start = len(self.text)
        self.text += words
        if label:
            self.spans.append(Span(start, len(self.text), label))
        return start

    def _slot(self, slot: str) -> None:
        if slot in lexicon.WORDS:
            self._word(slot)
        elif slot.endswith(".again") and slot != "home.again":
            self._put(self._last.get(slot.removesuffix(".again")) or self._pick(slot.removesuffix(".again")))
        elif slot in self._pronouns:
            self._put(self._pronouns[slot], "pronoun")
            self._persons.add("hero")
        elif slot in self._speech:
            self._put(self._speech[slot])
        elif slot[0] == "n" and slot[1:] in self._neighbour_pronouns:
            self._put(self._neighbour_pronouns[slot[1:]])
        elif slot.startswith("n."):
            self._world(slot[2:])
        else:
            self._named(slot)

    def _named(self, slot: str) -> None:
        """Write a slot that has its own rule."""
        plan = self.plan
        match slot:
            case "H":
                self._hero(plan.hero)
            case "Hn":
                self._noun_or_name()
            case "S":
                self._subject()
            case "N" | "Nn":
                self._neighbour(described=slot == "N")
            case "V":
                self._put(plan.villain["V" in self._known], "villain")
                self._known.add("V")
                self._persons.add("villain")
            case "girl" | "kin2" | "a.trait.girl":
                self._common(slot)
            case "home" | "home.again":
                self._fact(plan.hero, "lives_in", plan.town, plan.town)
            case "place" | "the.place":
                phrase = lexicon.PLACES[plan.place] if slot == "place" else f"the {plan.place}"
                self._put(phrase, "place")
            case "weather" | "wx":
                self._weather(clause=slot == "weather")
            case "a.pet" | "the.pet" | "pet":
                self._pet(slot)
            case "a.obj" | "the.obj" | "his.obj" | "obj":
                self._item(slot)
            case _:
                raise KeyError(slot)

    def _word(self, slot: str) -> None:
        qualifier, share = QUALIFIED.get(slot, ("", 0.0))
        if self.rng.random() < share:
            self._put(f"{self._pick(qualifier)} ")
        self._put(self._pick(slot))

    def _pick(self, slot: str) -> str:
        """A random word of a list, preferring words not yet used in this story."""
        words = lexicon.WORDS[slot]
        fresh = [w for w in words if w not in self._used] or words
        word = self.rng.choice(fresh)
        self._used.add(word)
        self._last[slot] = word
        return word

    def _hero(self, words: str) -> None:
        self._put(words, "hero")
        self._persons.add("hero")
        self._known.add("hero")

    def _subject(self) -> None:
        """Write the hero as the subject: by a pronoun only where it is unambiguous, else by name or a noun."""
        draw = self.rng.random()
        others = {"neighbour", "villain"} & self._before
        clear = "hero" in self._known and (not others or (self.plan.plural and "hero" in self._before))
        if clear and draw < (PRONOUN_SHARE if "hero" in self._before else PRONOUN_SHARE / 2):
            self._put(self._pronouns["he"], "pronoun")
            self._persons.add("hero")
        else:
            self._noun_or_name()

    def _noun_or_name(self) -> None:
        known = "hero" in self._known and self.rng.random() < NOUN_SHARE[self.plan.plural]
        self._hero(f"the {self._noun()}" if known else self.plan.hero)

    def _noun(self) -> str:
        noun = "girl" if self.plan.gender == "female" else "boy"
        return noun + "s" if self.plan.plural else noun

    def _common(self, slot: str) -> None:
        if slot == "kin2":
            self._put("sisters" if self.plan.gender == "female" else "brothers")
        elif slot == "girl":
            self._put(self._noun())
        elif self.plan.plural:
            self._put(f"two {self._pick('trait')} {self._noun()}")
        else:
            self._put(with_article(f"{self._pick('trait')} {self._noun()}"))

    def _neighbour(self, described: bool) -> None:
        someone = self.plan.neighbour
        self._put(someone.name, "neighbour")
        self._persons.add("neighbour")
        draw = self.rng.random()
        if described and "neighbour" not in self._known and draw < 0.6:
            if draw < 0.3:
                self._put(" from ")
                self._world("town")
            else:
                self._put(" the ")
                self._world("job")
        self._known.add("neighbour")

    def _world(self, what: str) -> None:
        someone = self.plan.neighbour
        relation = {"town": "lives_in", "job": "works_as", "thing": "owns", "own": "owns"}[what]
        value = getattr(someone, relation)
        if what == "thing":
            self._put(with_article(value)[: -len(value)])
        self._fact(someone.name, relation, value, value, world=True)

    def _fact(self, subject: str, relation: str, value: str, words: str, world: bool = False) -> None:
        start = self._put(words, f"fact:{relation}")
        self.facts.append(Fact(subject, relation, value, start, len(self.text), world))

    def _weather(self, clause: bool) -> None:
        clauses, nouns = lexicon.WEATHER[self.plan.weather]
        if not clause:
            self._put(self.rng.choice(nouns), "weather")
            return
        fresh = [c for c in clauses if c not in self._used] or list(clauses)
        template = self.rng.choice(fresh)
        self._used.add(template)
        start = len(self.text)
        self._write(template)
        self.spans.append(Span(start, len(self.text), "weather"))

    def _pet(self, slot: str) -> None:
        plan = self.plan
        draw = self.rng.random()
        if slot == "pet":
            self._put(plan.animal, "animal")
        elif "pet" in self._known:
            named = "pet_name" in self._known and draw < 0.5
            self._put(plan.pet_name if named else f"the {plan.animal}", "animal")
        else:
            self._put(with_article(f"{plan.coat} {plan.animal}"), "animal")
            if slot == "a.pet" and draw < 0.4:
                self._put(" called ")
                self._fact(plan.animal, "called", plan.pet_name, plan.pet_name)
                self._known.add("pet_name")
        self._known.add("pet")

    def _item(self, slot: str) -> None:
        plan = self.plan
        phrase = f"{plan.item_adjective} {plan.item}"
        if slot == "a.obj":
            self._put(with_article(phrase)[: -len(phrase)])
            start = self._put(phrase, "object")
            self.facts.append(Fact(plan.hero, "owns", phrase, start, len(self.text), False))
        else:
            new = "obj" not in self._known
            if slot == "his.obj" or (slot == "the.obj" and new):
                self._put(f"{self._pronouns['his']} ", "")
            elif slot == "the.obj":
                self._put("the ")
            self._put(phrase if new or self.rng.random() < 0.2 else plan.item, "object")
        self._known.add("obj")
