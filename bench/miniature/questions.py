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

# Words that name a single event, in the captions' and in other common words.
_STEPS = {
    "moving left": r"left(?:wards?)?\b",
    "moving right": r"right(?:wards?)?\b",
    "moving up": r"(?:up(?:wards?)?|top)\b|ris(?:es|ing)\b|ascend",
    "moving down": r"(?:down(?:wards?)?|bottom)\b|fall(?:s|ing)\b|descend|sink(?:s|ing)\b",
    "appearing": r"appear(?!s? to\b)|emerg|(?:fad|com)(?:es?|ing) in(?:to view)?\b",
    "disappearing": r"disappear|vanish|fad(?:es?|ing) (?:out|away)\b",
    "growing": r"grow|bigger\b|larger\b|expand|enlarg|zoom(?:s|ing)? in\b",
    "shrinking": r"shr[iau]nk|smaller\b|contract(?:s|ing)\b|zoom(?:s|ing)? out\b",
}
_SPEEDS = {"moving slowly": r"slow", "moving quickly": r"quick|fast|rapid|swift"}
_NUMBER = {event.phrase: number for number, event in enumerate(EVENTS)}


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
    asked for ("moving left then right" in answer to "motion"); for "caption" a label. An answer that lists several
    things is held to its first.

    Raises ValueError for another kind.
    """
    text = text.lower()
    if kind in ("item", "colour"):
        return next(iter(_named(ITEMS if kind == "item" else COLOURS, text)), None)
    if kind == "caption":
        item, colour, event = parse("item", text), parse("colour", text), _event(text)
        both = isinstance(item, int) and isinstance(colour, int)
        return (item, colour, -1 if event is None else event) if both else None  # type: ignore[return-value]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(QUESTIONS)}")
    return _event(text, kind)


def _event(text: str, kind: str = "") -> int | None:
    """The event that an answer names, by the captions' words or by other common ones.

    Two counterparts are two steps of one event where "then" is between them, or where the order was asked for.
    """
    speeds = [_NUMBER[phrase] for phrase in _words(_SPEEDS, text)]
    if kind == "speed" and speeds:
        return speeds[0]
    text = re.sub(r"\bfrom (?:the )?\w+(?: side)? (?=to\b)", "", text)  # "from left to right" is moving right
    steps = _words(_STEPS, text)
    if not steps:
        return speeds[0] if speeds else None
    first = steps[0]
    if len(steps) > 1 and (kind == "order" or re.search(r"\bthen\b", text)):
        second = next((step for step in steps if step != first), first)
        return _NUMBER.get(f"{first} then {second.removeprefix('moving ')}")
    return _NUMBER[first]


def _named(names: Sequence[str], text: str) -> list[int]:
    return [names.index(name) for name in _words({name: re.escape(name) for name in names}, text)]


def _words(patterns: dict[str, str], text: str) -> list[str]:
    """The keys whose patterns begin a word of the text, in the order of the text."""
    found = [(match.start(), key) for key, one in patterns.items() for match in re.finditer(rf"\b(?:{one})", text)]
    return [key for _, key in sorted(found)]
