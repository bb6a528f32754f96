"""Moving clips in pairs: an event and its counterpart, whose clips hold the very same frames in another order.

A frame shows the object and its colour; which event of a pair it is, only the order of the frames tells:

- direction (left, right, up, down) and appearing or vanishing: the counterpart is the exact time reversal;
- order of two events ("moving left then right" against "moving right then left"): there and back on the same way,
  begun at the other end. Each clip is its own time reversal, so that the direction of time does not tell them apart;
- speed ("moving slowly", "moving quickly"): a swing at T equally spaced phases of its period, visited with a step of
  one phase (one swing a clip) or of three (three swings a clip, 2.4 times the mean displacement from frame to frame).
  Three has no common divisor with T = 8, so both visit the same phases.

The same draws give both clips of a pair the same multiset of frames, exactly; so no function of the set of frames, a
frame mean least of all, can do better than chance on a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from bt_adapter.mini.items import ITEMS, Items
from bt_adapter.mini.scenes import COLOURS, SIZE, TEMPLATES, _bytes, _compose, _looks, _uniform

FRAMES = 8
FAST = 3  # phases a quick swing is ahead of the last frame; coprime to FRAMES


class Event(NamedTuple):
    """phrase: of the caption. kind: of temporal fact. channel: what changes. profile: how, in [0, 1]."""

    phrase: str
    kind: str
    channel: str
    profile: str


EVENTS = (
    Event("moving left", "direction", "x", "fall"),
    Event("moving right", "direction", "x", "rise"),
    Event("moving up", "direction", "y", "fall"),
    Event("moving down", "direction", "y", "rise"),
    Event("appearing", "appearing", "alpha", "rise"),
    Event("disappearing", "appearing", "alpha", "fall"),
    Event("moving left then right", "order", "x", "dip"),
    Event("moving right then left", "order", "x", "peak"),
    Event("moving up then down", "order", "y", "dip"),
    Event("moving down then up", "order", "y", "peak"),
    Event("growing then shrinking", "order", "size", "peak"),
    Event("shrinking then growing", "order", "size", "dip"),
    Event("appearing then disappearing", "order", "alpha", "peak"),
    Event("disappearing then appearing", "order", "alpha", "dip"),
    Event("moving slowly", "speed", "swing", "slow"),
    Event("moving quickly", "speed", "swing", "fast"),
)
KINDS = tuple(dict.fromkeys(event.kind for event in EVENTS))
PAIRS = len(EVENTS) // 2
NEW_WORDS = ("then", "slowly", "quickly")  # that the mini CLIP's tokenizer lacks


def counterpart(event: Tensor) -> Tensor:
    """Number in EVENTS of each event's counterpart: its neighbour."""
    return event ^ 1


def of_kind(kind: str) -> list[int]:
    """Numbers in EVENTS of the events of a kind."""
    return [number for number, event in enumerate(EVENTS) if event.kind == kind]


def every_label() -> Tensor:
    """All captions: int64 [768, 3] of item, colour and event, event fastest."""
    return torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.arange(len(EVENTS)))


def label_number(labels: Tensor) -> Tensor:
    """int64 [n, 3] to the row of each in :func:`every_label`."""
    return (labels[:, 0] * len(COLOURS) + labels[:, 1]) * len(EVENTS) + labels[:, 2]


def caption(item: int, colour: int, event: int = -1, template: int = 0) -> str:
    """ "a red sneaker moving left then right"; event -1 names none."""
    told = f"{COLOURS[colour]} {ITEMS[item]}" + (f" {EVENTS[event].phrase}" if event >= 0 else "")
    return TEMPLATES[template].format(told)


@dataclass(frozen=True)
class Draws:
    """All that is random in n clips but item, colour and event; a row serves any event."""

    sprite: Tensor  # uint8 [n, 28, 28]
    travel: Tensor  # [n], pixels of a motion
    place: Tensor  # [n, 2], centre of the motion
    rest: Tensor  # [n, 2], where it stands along an axis it does not move on, from that centre
    base: Tensor  # [n], mean size of what grows
    wide: Tensor  # [n], size of what does not
    ratio: Tensor  # [n], of the sizes of what grows
    dim: Tensor  # [n], opacity of what does not fade
    faint: Tensor  # [n]
    full: Tensor  # [n]
    phase: Tensor  # [n], of a swing
    upright: Tensor  # bool [n], whether a swing is vertical
    tint: Tensor  # [n, 3]
    background: Tensor  # [n, 3, 48, 48]

    def repeat(self, times: int) -> Draws:
        """Every row ``times`` times, one after the other."""
        return Draws(*(getattr(self, field.name).repeat_interleave(times, 0) for field in fields(self)))


def draw(items: Items, item: Tensor, colour: Tensor, generator: torch.Generator) -> Draws:
    """The draws of n clips of these items and colours, int64 [n] each."""
    n = len(item)
    travel = _uniform(n, 12, 24, generator)
    tint, background = _looks(colour, generator)
    return Draws(
        sprite=items.draw(item, generator),
        travel=travel,
        place=SIZE / 2 + _uniform((n, 2), -1, 1, generator) * (14 - travel[:, None] / 2),
        rest=_uniform((n, 2), -0.5, 0.5, generator) * travel[:, None],
        base=_uniform(n, 18, 26, generator),
        wide=_uniform(n, 16, 32, generator),
        ratio=_uniform(n, 1.6, 2.2, generator),
        dim=_uniform(n, 0.6, 1, generator),
        faint=_uniform(n, 0, 0.15, generator),
        full=_uniform(n, 0.8, 1, generator),
        phase=_uniform(n, 0, 2 * math.pi, generator),
        upright=torch.rand(n, generator=generator) < 0.5,
        tint=tint,
        background=background,
    )


def render(draws: Draws, event: Tensor) -> Tensor:
    """Clips of n draws and events int64 [n]: uint8 [n, 8, 3, 48, 48]."""
    value = _profiles(draws.phase, event)

    def moves(channel: str) -> Tensor:
        return torch.tensor([known.channel == channel for known in EVENTS])[event]

    swing = moves("swing")
    step = (value - 0.5) * draws.travel[:, None]
    centre = []
    for axis, moving in enumerate((moves("x") | (swing & ~draws.upright), moves("y") | (swing & draws.upright))):
        shift = torch.where(moving[:, None], step, draws.rest[:, axis, None])
        centre.append(draws.place[:, axis, None] + shift)
    grown = draws.base[:, None] * draws.ratio[:, None] ** (value - 0.5)
    size = torch.where(moves("size")[:, None], grown, draws.wide[:, None])
    faded = draws.faint[:, None] + (draws.full - draws.faint)[:, None] * value
    alpha = torch.where(moves("alpha")[:, None], faded, draws.dim[:, None])
    return _bytes(_compose(draws.sprite, torch.stack(centre, -1), size, alpha, draws.tint, draws.background))


def _profiles(phase: Tensor, event: Tensor) -> Tensor:
    """How far each clip's event is in each frame, [n, 8] in [0, 1]."""
    half = FRAMES // 2
    rise = torch.arange(FRAMES) / (FRAMES - 1)
    back = torch.arange(half) / (half - 1)
    peak = torch.cat([back, back.flip(0)])
    fixed = {"rise": rise, "fall": rise.flip(0), "peak": peak, "dip": torch.cat([back.flip(0), back])}
    swings = {"slow": _swing(phase, 1), "fast": _swing(phase, FAST)}
    rows = [swings.get(known.profile, fixed.get(known.profile)) for known in EVENTS]
    table = torch.stack([row.expand(len(phase), -1) for row in rows if row is not None], 1)
    return table[torch.arange(len(event)), event]


def _swing(phase: Tensor, step: int) -> Tensor:
    # the phases are numbered modulo T before the cosine is taken, so that both speeds give the very same floats
    number = (torch.arange(FRAMES) * step) % FRAMES
    return 0.5 + 0.5 * torch.cos(phase[:, None] + number * (2 * math.pi / FRAMES))


def balanced_labels(per_kind: int, generator: torch.Generator) -> Tensor:
    """``per_kind`` labels of each kind, its events alike often, items and colours uniform: int64 [4·per_kind, 3]."""
    event = torch.cat([torch.tensor(of_kind(kind)).repeat(per_kind // len(of_kind(kind))) for kind in KINDS])
    item = torch.randint(len(ITEMS), (len(event),), generator=generator)
    colour = torch.randint(len(COLOURS), (len(event),), generator=generator)
    return torch.stack([item, colour, event], 1)


def paired_labels(pairs: int, generator: torch.Generator) -> Tensor:
    """Labels of ``pairs`` different pairs, counterparts as neighbours: int64 [2·pairs, 3], no caption twice.

    A batch in which each clip stands beside its counterpart, of the same object and colour, asks for the order of
    frames; among random captions, object and colour would tell nearly all of them apart. Kinds are alike often.
    """
    weight = _pair_weights().repeat(len(ITEMS) * len(COLOURS))
    return _with_counterparts(every_label()[::2][torch.multinomial(weight, pairs, generator=generator)])


def object_labels(pairs: int, generator: torch.Generator) -> Tensor:
    """As :func:`paired_labels`, each pair with another object, all in one colour: such a batch asks for objects too.

    pairs: at most as many as there are objects.
    """
    item = torch.randperm(len(ITEMS), generator=generator)[:pairs]
    colour = torch.randint(len(COLOURS), (1,), generator=generator).expand(pairs)
    event = 2 * torch.multinomial(_pair_weights(), pairs, replacement=True, generator=generator)
    return _with_counterparts(torch.stack([item, colour, event], 1))


def _pair_weights() -> Tensor:
    """Of each pair of events, so that the kinds are alike often."""
    return torch.tensor([1.0 / len(of_kind(EVENTS[2 * pair].kind)) for pair in range(PAIRS)])


def _with_counterparts(first: Tensor) -> Tensor:
    second = torch.cat([first[:, :2], counterpart(first[:, 2:])], 1)
    return torch.stack([first, second], 1).flatten(0, 1)
