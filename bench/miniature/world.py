"""The small world: one tinted item on a dim background, in clips where something happens and in stills that show it.

The item and its colour show in any frame. Events come in pairs, neighbours in ``EVENTS``, whose clips hold **the same
frames in another order**, so that no function of the set of frames, a frame mean least of all, tells the two apart
better than by chance:

- motion and size: the counterpart is the exact time reversal;
- order of two events: there and back on the same way, begun at the other end. Each clip is its own time reversal, so
  that the direction of time does not tell them apart;
- speed: a swing at eight phases of its period, visited one at a time (one swing a clip) or every third (three swings).

A still in which an event shows (:func:`exposures`) is a weighted mean of the event's frames, as a shutter or a flash
weighs them. Labels are int64 ``[n, 3]``: item, colour and event, the event -1 where a still shows none. Images are
uint8 RGB of 48 x 48 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from miniature.items import ITEMS, Items
from torch import Tensor

SIZE = 48
FRAMES = 8
FAST = 3  # phases between two frames of a quick swing; coprime to FRAMES, so that all phases are visited
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
TEMPLATES = ("a {}", "the {}", "a photo of a {}", "a picture of a {}")
RGB = ((0.95, 0.12, 0.12), (0.1, 0.85, 0.15), (0.15, 0.3, 1.0), (0.95, 0.9, 0.1), (0.7, 0.15, 0.85), (0.95, 0.95, 0.95))


class Event(NamedTuple):
    """An event of a clip: its words, the kind of its questions, the property that changes, and its course in 0..1."""

    phrase: str
    kind: str
    channel: str
    profile: str


EVENTS = (
    Event("moving left", "motion", "x", "fall"),
    Event("moving right", "motion", "x", "rise"),
    Event("moving up", "motion", "y", "fall"),
    Event("moving down", "motion", "y", "rise"),
    Event("appearing", "motion", "opacity", "rise"),
    Event("disappearing", "motion", "opacity", "fall"),
    Event("growing", "size", "size", "rise"),
    Event("shrinking", "size", "size", "fall"),
    Event("moving left then right", "order", "x", "dip"),
    Event("moving right then left", "order", "x", "peak"),
    Event("moving up then down", "order", "y", "dip"),
    Event("moving down then up", "order", "y", "peak"),
    Event("growing then shrinking", "order", "size", "peak"),
    Event("shrinking then growing", "order", "size", "dip"),
    Event("appearing then disappearing", "order", "opacity", "peak"),
    Event("disappearing then appearing", "order", "opacity", "dip"),
    Event("moving slowly", "speed", "swing", "slow"),
    Event("moving quickly", "speed", "swing", "fast"),
)
KINDS = tuple(dict.fromkeys(event.kind for event in EVENTS))
SINGLE = tuple(number for number, event in enumerate(EVENTS) if event.kind in ("motion", "size"))
EXPOSURES = ("ramp", "rear flash", "front flash", "ghosts", "late shutter")
Draws = dict[str, Tensor]  # of :func:`draw`


def of_kind(*kinds: str) -> tuple[int, ...]:
    """Numbers in EVENTS of the events of these kinds."""
    return tuple(number for number, event in enumerate(EVENTS) if event.kind in kinds)


def caption(item: int, colour: int, event: int = -1, template: int = 0) -> str:
    """The caption of a label, as "a red sneaker moving left"; a negative item, colour or event is left unnamed."""
    words = (
        COLOURS[colour] if colour >= 0 else "",
        ITEMS[item] if item >= 0 else "thing",
        EVENTS[event].phrase if event >= 0 else "",
    )
    return TEMPLATES[template].format(" ".join(filter(None, words)))


def random_labels(n: int, events: Sequence[int], generator: torch.Generator) -> Tensor:
    """``n`` labels, uniform over items, colours and the given events (-1 among them: none)."""
    columns = (torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor(list(events)))
    return torch.stack([values[torch.randint(len(values), (n,), generator=generator)] for values in columns], 1)


def draw(items: Items, labels: Tensor, generator: torch.Generator) -> Draws:
    """All that is random in scenes with these items and colours, by name: a row serves any event, and both of a pair.

    Sizes are in pixels, and so are places; opacities in 0..1.
    """
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    travel = uniform(12, 24)
    coarse = uniform(0, 1, 3, 6, 6) * uniform(0.05, 0.3, 1, 1, 1)
    return {
        "sprite": items.draw(labels[:, 0], generator),  # uint8 [n, 28, 28]
        "travel": travel,  # [n], of a motion
        "place": SIZE / 2 + uniform(-1, 1, 2) * (14 - travel[:, None] / 2),  # [n, 2], centre of the motion
        "rest": uniform(-0.5, 0.5, 2) * travel[:, None],  # [n, 2], off that centre along an axis without motion
        "size": uniform(16, 32),  # [n], of what keeps its size
        "mean_size": uniform(18, 26),  # [n], of what grows
        "growth": uniform(1.6, 2.2),  # [n], ratio of its largest to its smallest size
        "opacity": uniform(0.6, 1),  # [n], of what does not fade
        "faint": uniform(0, 0.15),  # [n], least opacity of what fades
        "full": uniform(0.8, 1),  # [n], greatest opacity of what fades
        "phase": uniform(0, 2 * math.pi),  # [n], of a swing
        "vertical": torch.rand(n, generator=generator) < 0.5,  # bool [n], whether a swing is
        "tint": (torch.tensor(RGB)[labels[:, 1]] + uniform(-0.08, 0.08, 3)).clamp(0, 1),  # [n, 3]
        "background": F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear"),  # [n, 3, 48, 48]
    }


def clips(items: Items, labels: Tensor, generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """One clip a label: uint8 ``[n, frames, 3, 48, 48]``, the same scenes whatever ``frames`` is.

    Counterparts hold the same frames, but for speed, where ``frames`` must not be a multiple of 3.
    """
    return _bytes(_scenes(draw(items, labels, generator), labels[:, 2], frames=frames))


def paired_clips(items: Items, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One clip a label as :func:`clips`, where counterparts are neighbours and hold the same frames."""
    draws = draw(items, labels[::2], generator)
    return _bytes(_scenes({name: value.repeat_interleave(2, 0) for name, value in draws.items()}, labels[:, 2]))


def with_counterparts(labels: Tensor) -> Tensor:
    """Each label, followed by that of its counterpart."""
    return torch.stack([labels, labels ^ torch.tensor([0, 0, 1])], 1).flatten(0, 1)


def plain_stills(items: Items, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One still a label in which nothing happens: uint8 ``[n, 3, 48, 48]``. The item is anywhere, 17 to 36 px wide."""
    draws, n = draw(items, labels, generator), len(labels)
    size = torch.rand(n, generator=generator) * 19 + 17
    margin = (size * 0.42).clamp(max=SIZE / 2)[:, None]
    centre = margin + torch.rand(n, 2, generator=generator) * (SIZE - 2 * margin)
    return _bytes(_compose(draws, centre[:, None], size[:, None], draws["opacity"][:, None])[:, 0])


def exposures(items: Items, labels: Tensor, generator: torch.Generator, kinds: Sequence[str] = EXPOSURES) -> Tensor:
    """One still a label in which its event shows: uint8 ``[n, 3, 48, 48]``, each of a random one of ``kinds``."""
    draws = draw(items, labels, generator)
    return _bytes(_scenes(draws, labels[:, 2], exposure_weights(len(labels), generator, kinds)))


def exposure_weights(n: int, generator: torch.Generator, kinds: Sequence[str] = EXPOSURES) -> Tensor:
    """Draw the weights of the eight frames in ``n`` stills, ``[n, 8]``, each row of sum 1.

    In every kind the end of the event weighs more than its beginning, so that a still tells which of a pair it shows:
    "ramp": a long exposure under a brightening light; "rear flash": an even exposure and a flash at its end; "front
    flash": a weak flash at the beginning, then a ramp; "ghosts": three instants of growing weight; "late shutter": a
    ramp over the last four to six frames.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, 1, generator=generator) * (high - low) + low

    number = torch.arange(FRAMES)
    ramp = (0.12 + 0.88 * number / (FRAMES - 1)) ** uniform(1, 3)
    first, last = (number == 0).float(), (number == FRAMES - 1).float()
    flash, share = uniform(0.35, 0.65), uniform(0.2, 0.35)
    middle = (number == torch.randint(2, 6, (n, 1), generator=generator)).float()
    opened = torch.randint(2, 5, (n, 1), generator=generator)
    table = {
        "ramp": ramp,
        "rear flash": flash * last + (1 - flash) / FRAMES,
        "front flash": 0.2 * first + 0.8 * ramp / ramp.sum(1, keepdim=True),
        "ghosts": share / 2 * first + share * middle + (1 - 1.5 * share) * last,
        "late shutter": ramp * (number >= opened),
    }
    weights = torch.stack([table[kind] for kind in kinds], 1)
    chosen = weights[torch.arange(n), torch.randint(len(kinds), (n,), generator=generator)]
    return chosen / chosen.sum(1, keepdim=True)


def _scenes(draws: Draws, event: Tensor, weights: Tensor | None = None, frames: int = FRAMES) -> Tensor:
    """The frames of the events as floats in 0..1, or with weights ``[n, frames]`` their weighted mean."""
    value = _profiles(draws["phase"], event, frames)  # how far each event is in each frame

    def changes(channel: str) -> Tensor:
        return torch.tensor([known.channel == channel for known in EVENTS])[event]

    swing, centre = changes("swing"), []
    for axis, moves in enumerate((changes("x") | swing & ~draws["vertical"], changes("y") | swing & draws["vertical"])):
        step = (value - 0.5) * draws["travel"][:, None]
        centre.append(draws["place"][:, axis, None] + torch.where(moves[:, None], step, draws["rest"][:, axis, None]))
    grown = draws["mean_size"][:, None] * draws["growth"][:, None] ** (value - 0.5)
    size = torch.where(changes("size")[:, None], grown, draws["size"][:, None])
    faded = draws["faint"][:, None] + (draws["full"] - draws["faint"])[:, None] * value
    opacity = torch.where(changes("opacity")[:, None], faded, draws["opacity"][:, None])
    return _compose(draws, torch.stack(centre, -1), size, opacity, weights)


def _profiles(phase: Tensor, event: Tensor, frames: int) -> Tensor:
    """Compute the progress of each clip's event in each frame, ``[n, frames]`` in [0, 1]."""
    half, odd = (frames + 1) // 2, frames % 2  # the turning point of an odd number is a frame of its own
    rise, back = torch.arange(frames) / (frames - 1), torch.arange(half) / (half - 1)
    dip, peak = torch.cat([back.flip(0), back[odd:]]), torch.cat([back, back.flip(0)[odd:]])
    known = {"rise": rise, "fall": rise.flip(0), "dip": dip, "peak": peak}
    for name, ahead in (("slow", 1), ("fast", FAST)):
        # phases are numbered modulo frames before the cosine is taken, so that both speeds give the very same floats
        turn = (torch.arange(frames) * ahead) % frames * (2 * math.pi / frames)
        known[name] = 0.5 + 0.5 * torch.cos(phase[:, None] + turn)
    table = torch.stack([known[one.profile].expand(len(phase), -1) for one in EVENTS], 1)
    return table[torch.arange(len(event)), event]


def _compose(draws: Draws, centre: Tensor, size: Tensor, opacity: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sprites placed at ``centre`` [n, T, 2] with ``size`` and ``opacity`` [n, T]: float [n, T, 3, 48, 48].

    With weights [n, T] the weighted mean over T, [n, 3, 48, 48]; a frame is linear in cover and light, so these are
    averaged, which is a third of the work.
    """
    n, frames = size.shape
    theta = torch.zeros(n, frames, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = SIZE / size
    theta[..., :, 2] = (SIZE - 2 * centre) / size[..., None]
    grid = F.affine_grid(theta.flatten(0, 1), [n * frames, 1, SIZE, SIZE], align_corners=False)
    sprite = (draws["sprite"].float() / 255)[:, None, None].expand(n, frames, 1, 28, 28).flatten(0, 1)
    value = F.grid_sample(sprite, grid, align_corners=False).view(n, frames, SIZE, SIZE)
    cover = (value * 3).clamp_(max=1) * opacity[..., None, None]
    light = (value * 0.75 + 0.25) * cover
    if weights is not None:
        cover, light = ((part * weights[..., None, None]).sum(1, keepdim=True) for part in (cover, light))
    image = (
        draws["background"][:, None] * (1 - cover[:, :, None])
        + light[:, :, None] * draws["tint"][:, None, :, None, None]
    )
    return image if weights is None else image[:, 0]


def _bytes(frames: Tensor) -> Tensor:
    return (frames * 255).round_().clamp_(0, 255).to(torch.uint8)
