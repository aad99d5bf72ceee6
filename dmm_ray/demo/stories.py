"""Short English stories with labels, character spans and facts: the demo's text and its ground truth.

A story is a function of ``(seed, index, fixed)`` alone. Its attributes are drawn independently of each
other, so that no label predicts another; ``fixed`` tells the same story with some of them changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from dmm_ray.demo import lexicon, scenes
from dmm_ray.demo.story_plots import HARM_PLOTS, PLOTS, Plot
from dmm_ray.demo.writer import Fact, Span, StoryPlan, StoryWriter
from dmm_ray.errors import UserError
from dmm_ray.files import write_bytes

HARM_SHARE: Final = 0.15
ATTRIBUTES: Final[Mapping[str, tuple[str, ...]]] = {
    "sentiment": ("positive", "negative"),
    "gender": ("female", "male"),
    "number": ("singular", "plural"),
    "tense": ("past", "present"),
    "place": tuple(lexicon.PLACES),
    "weather": tuple(lexicon.WEATHER),
    "animal": lexicon.ANIMALS,
    "harm": ("none", *(plot.harm for plot in HARM_PLOTS)),
}
# share of stories of each length, and their minimum and maximum number of sentences by stage
_SHAPES: Final = (
    (0.15, {"settings": (0, 1), "world": (0, 0), "follows": (0, 1), "incidents": (0, 0), "closings": (0, 1)}),
    (0.50, {"settings": (1, 2), "world": (0, 2), "follows": (1, 2), "incidents": (0, 2), "closings": (0, 1)}),
    (0.35, {"settings": (2, 4), "world": (1, 3), "follows": (2, 3), "incidents": (1, 3), "closings": (1, 2)}),
)


@dataclass(frozen=True)
class Story:
    """One story. ``labels`` holds every attribute, "none" where the text does not mention it.

    Offsets of ``spans`` and ``facts`` count characters of ``text``. Labels of spans: hero, pronoun (of the
    hero), neighbour, villain, animal, object, place, weather, fact:RELATION (the mention of a fact's object),
    and, for whole sentences, harm and sentiment.
    """

    text: str
    labels: dict[str, str]
    spans: list[Span]
    facts: list[Fact]

    def to_json(self) -> dict[str, Any]:
        """The story as JSON values, with spans and facts as objects."""
        return {
            "text": self.text,
            "labels": self.labels,
            "spans": [s._asdict() for s in self.spans],
            "facts": [f._asdict() for f in self.facts],
        }


def generate(n: int, seed: int = 0, fixed: Mapping[str, str] | None = None) -> Iterator[Story]:
    """Yield ``n`` stories; ``fixed`` sets attributes (see ATTRIBUTES) and leaves everything else unchanged.

    Raises UserError for an unknown attribute or value.
    """
    fixed = dict(fixed or {})
    for name, value in fixed.items():
        if value not in ATTRIBUTES.get(name, ()):
            known = ", ".join(ATTRIBUTES[name]) if name in ATTRIBUTES else ", ".join(ATTRIBUTES)
            raise UserError(f"fixed: no such attribute or value {name}={value}; there are: {known}")
    for index in range(n):
        yield _story(seed, index, fixed)


def write_corpus(path: str | Path, n: int = 3000, seed: int = 1) -> str:
    """Write ``n`` stories as JSON lines with the keys text, labels, spans and facts; return the path."""
    lines = (json.dumps(story.to_json()) for story in generate(n, seed))
    write_bytes(str(path), ("\n".join(lines) + "\n").encode())
    return str(path)


def _attributes(rng: Random, fixed: Mapping[str, str]) -> dict[str, str]:
    """Every attribute, drawn in a fixed order whether or not ``fixed`` overrides it, so that draws stay aligned."""
    drawn = {name: rng.choice(values) for name, values in ATTRIBUTES.items() if name != "harm"}
    kind = rng.choice(ATTRIBUTES["harm"][1:])
    drawn["harm"] = kind if rng.random() < HARM_SHARE else "none"
    return drawn | dict(fixed)


def _plan(rng: Random, labels: Mapping[str, str]) -> StoryPlan:
    item, draw = rng.choice(list(lexicon.OBJECTS)), rng.random()
    first, second = rng.random(), rng.random()
    names = lexicon.FEMALE if labels["gender"] == "female" else lexicon.MALE
    one = int(first * len(names))
    two = (one + 1 + int(second * (len(names) - 1))) % len(names)
    return StoryPlan(
        heroes=(names[one], names[two]) if labels["number"] == "plural" else (names[one],),
        gender=labels["gender"],
        tense=labels["tense"],
        place=labels["place"],
        weather=labels["weather"],
        animal=labels["animal"],
        coat=rng.choice(lexicon.COATS),
        pet_name=rng.choice(lexicon.PET_NAMES),
        item=item,
        item_adjective=lexicon.OBJECTS[item][int(draw * len(lexicon.OBJECTS[item]))],
        town=rng.choice(lexicon.TOWNS),
        villain=rng.choice(lexicon.VILLAINS),
        neighbour=rng.choice(lexicon.WORLD),
    )


def _story(seed: int, index: int, fixed: Mapping[str, str]) -> Story:
    rng = Random(f"plan {seed} {index}")
    labels = _attributes(rng, fixed)
    plan = _plan(rng, labels)
    ordinary = rng.choice(PLOTS)
    plot = next((p for p in HARM_PLOTS if p.harm == labels["harm"]), ordinary)
    writer = StoryWriter(plan, Random(f"text {seed} {index}"))
    _tell(writer, plot, labels["sentiment"] == "positive")
    return Story(writer.text, _labels(labels, plan, plot, writer), sorted(writer.spans), writer.facts)


def _tell(writer: StoryWriter, plot: Plot, happy: bool) -> None:
    """Write the whole story: opening, settings and world facts in any order, the plot, the ending."""
    rng = writer.rng
    shape = rng.choices([s for _, s in _SHAPES], [w for w, _ in _SHAPES])[0]
    count = {stage: rng.randint(*bounds) for stage, bounds in shape.items()}
    relations = rng.sample(lexicon.RELATIONS, count["world"])
    stages = ["settings"] * count["settings"] + relations
    rng.shuffle(stages)
    writer.sentence(scenes.OPENINGS)
    for stage in stages:
        writer.sentence(scenes.SETTINGS if stage == "settings" else scenes.WORLD_FACTS[stage])
    writer.sentence(plot.begins, "" if plot.harm == "none" else "harm")
    middle = ["follows"] * count["follows"] + ["incidents"] * count["incidents"]
    rng.shuffle(middle)
    for stage in middle:
        if stage == "follows":
            writer.sentence(plot.follows, linked=True)
        else:
            writer.sentence(scenes.INCIDENTS, without=plot.missing, linked=True)
    writer.sentence(plot.good if happy else plot.bad, "sentiment")
    for _ in range(count["closings"]):
        if happy:
            writer.sentence(scenes.GOOD_CLOSINGS, "sentiment")
        else:
            writer.sentence(scenes.BAD_CLOSINGS, "sentiment", without=plot.missing)


def _labels(drawn: Mapping[str, str], plan: StoryPlan, plot: Plot, writer: StoryWriter) -> dict[str, str]:
    """All labels, with "none" for whatever the text never mentions."""
    seen = {span.label for span in writer.spans}
    labels = {
        **drawn,
        "plot": plot.name,
        "hero": plan.hero,
        "object": plan.item,
        "neighbour": plan.neighbour.name,
        "town": plan.town,
    }
    for name in ("place", "weather", "animal", "object", "neighbour"):
        if name not in seen:
            labels[name] = "none"
    if not any(f.subject == plan.hero and f.relation == "lives_in" for f in writer.facts):
        labels["town"] = "none"
    return labels
