"""Questions and answers about scenes, in several phrasings, and the way back from an answer to what it says.

Every answer about a scene has one form, so that answers can be scored by their likelihood as well as by their text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from .items import ITEMS
from .scenes import _PHRASES, COLOURS, MOTIONS, Label

QUESTIONS: dict[str, tuple[str, ...]] = {
    "item": (
        "What is it?",
        "What is this?",
        "What item is shown?",
        "What do you see?",
        "Which piece of clothing is it?",
        "What kind of thing is this?",
        "Name the object.",
        "What object is here?",
    ),
    "colour": (
        "What color is it?",
        "What colour is it?",
        "Which color does it have?",
        "What is its color?",
        "What is the color of the object?",
        "Name the color.",
        "Tell me the color.",
        "Which colour is the thing?",
    ),
    "caption": (
        "Describe the picture.",
        "Write a short caption.",
        "What is shown here?",
        "Describe what you see.",
        "Caption this.",
        "Give a short description.",
    ),
    "motion": (
        "How is it moving?",
        "How does it move?",
        "What is it doing?",
        "What happens to it?",
        "What is the motion?",
        "How does the object move?",
        "What happens in the video?",
        "Describe the motion.",
    ),
}  # the mini CLIP's colours are spelled alike in both Englishes; questions come in both

# the words that give an answer's meaning away; the first that occurs counts
_MOTION_WORDS: tuple[tuple[str, int], ...] = (
    ("disappear", 8), ("vanish", 8), ("fading out", 8), ("appear", 7), ("fading in", 7), ("grow", 5), ("bigger", 5),
    ("shrink", 6), ("smaller", 6), ("left", 1), ("right", 2), ("up", 3), ("down", 4), ("still", 0), ("not mov", 0),
)  # fmt: skip


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def answer(kind: str, label: Label | tuple[int, int, int | None]) -> str:
    """The answer to a question of a kind ("item", "colour", "caption", "motion") about a scene."""
    item, colour, motion = label
    if kind == "item":
        return f"It is a {ITEMS[item]}."
    if kind == "colour":
        return f"It is {COLOURS[colour]}."
    if kind == "caption":
        return f"A {COLOURS[colour]} {ITEMS[item]}."
    if kind == "motion" and motion is not None:
        return f"It is {_PHRASES[motion]}."
    raise ValueError(
        f"kind is {kind!r} with motion {motion!r}; expected one of {tuple(QUESTIONS)}, motion told for 'motion'"
    )


def answers(kind: str) -> tuple[str, ...]:
    """All answers to a kind of question ("item", "colour" or "motion"), in the order of ITEMS, COLOURS or MOTIONS."""
    if kind == "item":
        return tuple(answer(kind, Label(i, 0)) for i in range(len(ITEMS)))
    if kind == "colour":
        return tuple(answer(kind, Label(0, i)) for i in range(len(COLOURS)))
    if kind == "motion":
        return tuple(answer(kind, Label(0, 0, i)) for i in range(len(MOTIONS)))
    raise ValueError(f"kind is {kind!r}; expected 'item', 'colour' or 'motion'")


def parse(kind: str, text: str) -> int | None:
    """What an answer says: an index into ITEMS, COLOURS or MOTIONS, or None when it says nothing of the kind.

    Takes the earliest word that names one, so an answer that lists several is held to its first.
    """
    text = text.lower()
    if kind == "motion":
        words = _MOTION_WORDS
    elif kind in ("item", "colour"):
        words = tuple((name, value) for value, name in enumerate(ITEMS if kind == "item" else COLOURS))
    else:
        raise ValueError(f"kind is {kind!r}; expected 'item', 'colour' or 'motion'")
    places = [(match.start(), value) for word, value in words if (match := re.search(rf"\b{word}", text))]
    return min(places, key=lambda place: place[0])[1] if places else None


def draw_turn(kind: str, label: Label, generator: torch.Generator | None = None) -> Turn:
    """A question of the kind in a random phrasing, and the answer."""
    phrasings = QUESTIONS[kind]
    return Turn(phrasings[int(torch.randint(len(phrasings), (), generator=generator))], answer(kind, label))
