"""Questions about the small world's clips and stills, their answers, and the way back from an answer to a label.

Each kind of question has one form of answer, so that answers can be told apart by their likelihood as well as by their
text. Kinds are "item", "colour", "caption" and those of the events (``world.KINDS``): "motion", "size", "order" and
"speed". "motion" and "size" are asked in the same words, which suit a still in which an event shows as well as a clip:
a model tuned on stills is asked nothing about clips that it has not heard before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from miniature.world import COLOURS, EVENTS, ITEMS, KINDS, caption

_EVENT = (
    "How is it moving?", "How does it move?", "What is it doing?", "What happens to it?", "What is happening?",
    "What is the motion?", "Describe the motion.", "How does the object change?",
)  # fmt: skip
QUESTIONS: dict[str, tuple[str, ...]] = {
    "item": (
        "What is it?", "What is this?", "What item is shown?", "What do you see?", "Which piece of clothing is it?",
        "What kind of thing is this?", "Name the object.", "What object is here?",
    ),
    "colour": (
        "What color is it?", "What colour is it?", "Which color does it have?", "What is its color?",
        "What is the color of the object?", "Name the color.", "Tell me the color.", "Which colour is the thing?",
    ),
    "caption": (
        "Describe what is shown.", "Write a short caption.", "What is shown here?", "Describe what you see.",
        "Caption this.", "Give a short description.",
    ),
    "motion": _EVENT,
    "size": _EVENT,
    "order": (
        "What happens first, and what then?", "In which order does it happen?", "Which two things happen?",
        "What does it do first, and what next?", "Describe both steps in order.", "What are the two steps?",
    ),
    "speed": (
        "How fast does it move?", "Is it slow or quick?", "What is its speed?", "At what speed is it moving?",
        "Does it move slowly or quickly?", "How quick is the motion?",
    ),
}  # fmt: skip


def draw_question(kind: str, generator: torch.Generator) -> str:
    """A question of the kind in a random phrasing."""
    return QUESTIONS[kind][int(torch.randint(len(QUESTIONS[kind]), (), generator=generator))]


def answer(kind: str, label: Sequence[int]) -> str:
    """The right answer to a question of the kind about a label: item, colour and event (-1 where nothing happens).

    Raises ValueError for another kind, or for a question about an event that is not of its kind.
    """
    item, colour, event = label
    if kind == "item":
        return f"It is a {ITEMS[item]}."
    if kind == "colour":
        return f"It is {COLOURS[colour]}."
    if kind == "caption":
        return caption(item, colour, event).capitalize() + "."
    if kind not in KINDS or event < 0 or EVENTS[event].kind != kind:
        raise ValueError(f"no answer to a question of kind {kind!r} about event {event}; kinds: {', '.join(QUESTIONS)}")
    return f"It is {EVENTS[event].phrase}."


def parse(kind: str, text: str) -> int | tuple[int, int, int] | None:
    """The meaning of an answer, or None where it says nothing of the kind.

    It is an index into ITEMS or COLOURS; for the kinds of events one into EVENTS, which may be of another kind than was
    asked for ("moving left then right" in answer to "motion"); for "caption" a label. Only the captions' words count,
    which are those that a model here has learned to say. An answer that lists several things is held to its first.

    Raises ValueError for another kind.
    """
    item, colour = _first_named(ITEMS, text), _first_named(COLOURS, text)
    event = _first_named([event.phrase for event in EVENTS], text)
    if kind == "caption":
        return None if item is None or colour is None else (item, colour, -1 if event is None else event)
    if kind not in QUESTIONS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(QUESTIONS)}")
    return {"item": item, "colour": colour}.get(kind, event)


def _first_named(names: Sequence[str], text: str) -> int | None:
    """The number of the name that comes first in a text; the longest, where one name begins with another."""
    longest_first = sorted(names, key=len, reverse=True)
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text.lower())
    return names.index(found[0]) if found else None
