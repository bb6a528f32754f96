"""Questions about the paired clips of `miniature.scenes`, their answers, and the way back from an answer.

Five types: "motion" (one event: a direction, appearing or disappearing), "order" of two events, "speed", "object" and
"colour". The clips come in pairs that hold the same frames in another order, so whoever sees a set of frames
alone answers at most half of the questions of the first three types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from miniature.scenes import EVENTS, KINDS, counterpart, draw, of_kind, render
from torch import Tensor

from bt_adapter.mini import questions
from bt_adapter.mini.items import ITEMS, Items
from bt_adapter.mini.questions import Turn
from bt_adapter.mini.scenes import COLOURS
from bt_adapter.mini.scenes import MOTIONS as SHIPPED_MOTIONS

KINDS_OF = {
    "motion": tuple(kind for kind in KINDS if kind not in ("order", "speed")),
    "order": ("order",),
    "speed": ("speed",),
}
TEMPORAL = tuple(KINDS_OF)
APPEARANCE = {"object": "item", "colour": "colour"}  # their names in bt_adapter.mini.questions
TYPES = (*TEMPORAL, *APPEARANCE)
EVENTS_OF = {name: [event for kind in kinds for event in of_kind(kind)] for name, kinds in KINDS_OF.items()}

PHRASINGS: dict[str, tuple[str, ...]] = {
    "motion": ("How does it move?", "What is it doing?", "What happens to it?"),
    "order": ("What happens first, and what then?", "In which order does it move?", "Which two things happen?"),
    "speed": ("How fast does it move?", "Is it slow or quick?", "What is its speed?"),
    "object": questions.QUESTIONS["item"][:3],
    "colour": questions.QUESTIONS["colour"][:3],
}
_SPEED_WORDS = (("slow", "moving slowly"), ("quick", "moving quickly"), ("fast", "moving quickly"))


def answers(kind: str) -> tuple[str, ...]:
    """All answers to a type of question; for a temporal one in the order of EVENTS_OF[kind]."""
    if kind in APPEARANCE:
        return questions.answers(APPEARANCE[kind])
    return tuple(f"It is {EVENTS[event].phrase}." for event in EVENTS_OF[kind])


def truth(kind: str, labels: Tensor) -> Tensor:
    """The right answer's place in `answers(kind)` for labels int64 [n, 3] of item, colour and event."""
    if kind in APPEARANCE:
        return labels[:, list(APPEARANCE).index(kind)]
    return (labels[:, 2, None] == torch.tensor(EVENTS_OF[kind])).int().argmax(1)


def parse(kind: str, text: str) -> int | None:
    """What an answer says, as a place in `answers(kind)`; None where it says nothing of the kind.

    Temporal: the first event named counts, and of those that begin alike the longest, so that "moving left then right"
    is no "moving left". Where no event is named in the captions' words, other common words for it are taken.
    """
    text = text.lower()
    if kind in APPEARANCE:
        return questions.parse(APPEARANCE[kind], text)
    found = [(match.start(), -len(e.phrase), n) for n, e in enumerate(EVENTS) if (match := re.search(e.phrase, text))]
    if found:
        event = min(found)[2]
    else:
        event = _loosely(kind, text)
    return EVENTS_OF[kind].index(event) if event in EVENTS_OF[kind] else None


def _loosely(kind: str, text: str) -> int:
    """An event's number by words outside the captions; -1 where none is there."""
    phrases = [event.phrase for event in EVENTS]
    if kind == "speed":
        places = [(text.find(word), phrase) for word, phrase in _SPEED_WORDS if word in text]
        return phrases.index(min(places)[1]) if places else -1
    shipped = questions.parse("motion", text) if kind == "motion" else None
    if not shipped:  # nothing, or standing still
        return -1
    name = SHIPPED_MOTIONS[shipped]
    return next((n for n, phrase in enumerate(phrases) if phrase in (name, f"moving {name}")), -1)


def turn(kind: str, label: tuple[int, int, int], generator: torch.Generator) -> Turn:
    """A question of the type in a random phrasing, and its answer."""
    phrasing = int(torch.randint(len(PHRASINGS[kind]), (), generator=generator))
    place = int(truth(kind, torch.tensor([label])))
    return Turn(PHRASINGS[kind][phrasing], answers(kind)[place])


def pairs(items: Items, counts: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of clips, counterparts as neighbours, events of a type in turn.

    counts: pairs of each temporal type. Returns frames uint8 [n, 8, 3, 48, 48] and labels int64 [n, 3] of item, colour
    and event; the types one after the other.
    """
    first = torch.cat([_in_turn(EVENTS_OF[kind][::2], count) for kind, count in counts.items()])
    item = torch.randint(len(ITEMS), (len(first),), generator=generator)
    colour = torch.randint(len(COLOURS), (len(first),), generator=generator)
    event = torch.stack([first, counterpart(first)], 1).flatten()
    frames = render(draw(items, item, colour, generator).repeat(2), event)
    return frames, torch.stack([item.repeat_interleave(2), colour.repeat_interleave(2), event], 1)


def _in_turn(events: list[int], count: int) -> Tensor:
    return torch.tensor(events)[torch.arange(count) % len(events)]


def type_of(labels: Tensor) -> dict[str, Tensor]:
    """{temporal type: bool [n], which labels have an event of it}."""
    return {kind: torch.isin(labels[:, 2], torch.tensor(events)) for kind, events in EVENTS_OF.items()}


def exposures(frames: Tensor) -> Tensor:
    """Long exposures of clips uint8 [n, T, 3, h, w]: stills [n, 1, 3, h, w], the later frames weighing more.

    A still in which motion shows, as in the mini CLIP's own training (`bt_adapter.mini.scenes.trails`).
    """
    weight = torch.linspace(0.15, 1, frames.shape[1]).square()
    weight = (weight / weight.sum()).view(-1, 1, 1, 1)
    mixed = [(part * weight).sum(1, keepdim=True) for part in frames.split(64)]
    return torch.cat(mixed).round().clamp(0, 255).to(torch.uint8)
