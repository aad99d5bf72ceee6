"""English morphology for the demo stories: verb forms, pronouns, articles, and the template notation.

A template is plain text with ``{slot}`` for a phrase and ``[verb]`` for a verb in the story's tense that
agrees with the hero; ``[verb.s]`` and ``[verb.p]`` agree with another singular or plural subject. A prefix
``1:`` or ``2:`` restricts a template to a single hero or a pair.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_IRREGULAR = """
    beat beat | become became | begin began | bet bet | bite bit | blow blew | break broke | bring
    brought | burn burned | buy bought | can could | catch caught | climb climbed | come came | creep
    crept | dig dug | do did | draw drew | eat ate | fall fell | feel felt | find found | flee fled |
    fly flew | forget forgot | forgive forgave | get got | give gave | go went | hang hung | hear heard
    | hide hid | hit hit | hold held | keep kept | know knew | lead led | leave left | lend lent | lie
    lay | light lit | lose lost | make made | meet met | must had to | put put | read read | ride rode |
    ring rang | rise rose | run ran | say said | see saw | sell sold | send sent | set set | shake shook
    | shine shone | sing sang | sit sat | sleep slept | speak spoke | spend spent | spit spat | stand
    stood | steal stole | take took | tell told | think thought | throw threw | wake woke | wear wore |
    weep wept | win won | write wrote
    | strike struck | drink drank | teach taught
"""
PAST = {pair.split()[0]: " ".join(pair.split()[1:]) for pair in _IRREGULAR.split("|")}
_DOUBLED = frozenset(
    (
        "beg",
        "clap",
        "drop",
        "drum",
        "grab",
        "hug",
        "plan",
        "quarrel",
        "rob",
        "slam",
        "step",
        "stir",
        "stop",
        "travel",
        "trip",
    )
)
_VOWELS = "aeiou"


@functools.cache
def conjugate(verb: str, past: bool, plural: bool) -> str:
    """The third-person form of ``verb`` (a base form) in past or present, plural or singular."""
    if verb == "be":
        return ("were" if plural else "was") if past else ("are" if plural else "is")
    if verb == "have":
        return "had" if past else ("have" if plural else "has")
    if verb == "cannot":
        return "could not" if past else "cannot"
    if past:
        return PAST.get(verb) or _regular_past(verb)
    if plural or verb in ("can", "will", "must"):
        return verb
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ies"
    return verb + "s"


def _regular_past(verb: str) -> str:
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    return verb + verb[-1] + "ed" if verb in _DOUBLED else verb + "ed"


def with_article(phrase: str) -> str:
    """``phrase`` with "a" or "an" before it."""
    return f"an {phrase}" if phrase.startswith((*_VOWELS, "honest", "hour")) else f"a {phrase}"


PRONOUNS = {
    ("female", False): {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    ("male", False): {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    ("female", True): {"he": "they", "him": "them", "his": "their", "himself": "themselves"},
    ("male", True): {"he": "they", "him": "them", "his": "their", "himself": "themselves"},
}
# first-person pronouns for a single hero (False) or a pair (True)
FIRST_PERSON = {
    False: {"I": "I", "me": "me", "my": "my", "am": "am", "was": "was", "myself": "myself"},
    True: {"I": "we", "me": "us", "my": "our", "am": "are", "was": "were", "myself": "ourselves"},
}


class SentencePart(NamedTuple):
    """One piece of a template: ``kind`` is text, slot or verb; ``option`` is what follows the dot."""

    kind: str
    value: str
    option: str


class Template(NamedTuple):
    """A parsed template; ``number`` is "singular", "plural" or "" for either."""

    parts: tuple[SentencePart, ...]
    number: str
    slots: frozenset[str]


_PIECE = re.compile(r"(\{[^}]+\}|\[[^\]]+\])")


@functools.cache
def parse(template: str) -> Template:
    """Parse ``template``, in the notation described in this module's docstring."""
    number = {"1:": "singular", "2:": "plural"}.get(template[:2], "")
    parts = []
    for piece in _PIECE.split(template[2:] if number else template):
        if piece.startswith("{"):
            parts.append(SentencePart("slot", piece[1:-1], ""))
        elif piece.startswith("["):
            verb, _, option = piece[1:-1].partition(".")
            parts.append(SentencePart("verb", verb, option))
        elif piece:
            parts.append(SentencePart("text", piece, ""))
    return Template(tuple(parts), number, frozenset(p.value for p in parts if p.kind == "slot"))
