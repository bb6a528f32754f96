"""Small scenes: one tinted item on a dim, varied background, standing or moving.

What is there shows in any one frame; how it moves does not: place, size, opacity and speed vary, and opposite motions
(left and right, up and down, growing and shrinking, appearing and disappearing) are exact time reversals of each
other: the same generator state gives the same frames in the opposite order.

Labels are int64 [n, 3]: item, colour, motion, with motion -1 where none is told. Images are uint8 RGB, 48 x 48.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .items import ITEMS, Items

SIZE = 48
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
MOTIONS = ("still", "left", "right", "up", "down", "growing", "shrinking", "appearing", "disappearing")
OPPOSITE = (0, 2, 1, 4, 3, 6, 5, 8, 7)
TEMPLATES = ("a {}", "the {}", "a photo of a {}", "a picture of a {}")

_RGB = torch.tensor(
    [
        [0.95, 0.12, 0.12],
        [0.10, 0.85, 0.15],
        [0.15, 0.30, 1.0],
        [0.95, 0.90, 0.10],
        [0.70, 0.15, 0.85],
        [0.95, 0.95, 0.95],
    ]
)
_PHRASES = (
    "standing still", "moving left", "moving right", "moving up", "moving down",
    "growing", "shrinking", "appearing", "disappearing",
)  # fmt: skip
_REVERSED = torch.tensor([False, True, False, True, False, False, True, False, True])


class Label(NamedTuple):
    """What a scene shows: indices into ITEMS, COLOURS and MOTIONS; motion None where none is told."""

    item: int
    colour: int
    motion: int | None = None


def to_labels(rows: torch.Tensor) -> list[Label]:
    """int64 [n, 3] -> one Label a row."""
    return [Label(item, colour, motion if motion >= 0 else None) for item, colour, motion in rows.tolist()]


def caption(label: Label | Sequence[int], template: str | int = 0) -> str:
    """The caption of a label ("a red sneaker moving left"). template: one of TEMPLATES or its number."""
    item, colour, motion = (int(-1 if part is None else part) for part in label)
    text = f"{COLOURS[colour]} {ITEMS[item]}"
    if motion >= 0:
        text += f" {_PHRASES[motion]}"
    return (TEMPLATES[template] if isinstance(template, int) else template).format(text)


def random_labels(n: int, motion: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """n uniform labels, int64 [n, 3]; without motion the last column is -1."""
    rows = torch.stack(
        [torch.randint(len(values), (n,), generator=generator) for values in (ITEMS, COLOURS, MOTIONS)], dim=1
    )
    if not motion:
        rows[:, 2] = -1
    return rows


def stills(
    items: Items, n: int, generator: torch.Generator | None = None, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """n still scenes: uint8 [n, 3, 48, 48] and labels [n, 3] (motion -1)."""
    labels = random_labels(n, False, generator) if labels is None else labels
    sprites = items.draw(labels[:, 0], generator)
    size = _uniform(n, 17, 36, generator)
    margin = (size * 0.42).clamp(max=SIZE / 2)
    centre = margin[:, None] + _uniform((n, 2), 0, 1, generator) * (SIZE - 2 * margin)[:, None]
    alpha = _uniform(n, 0.6, 1, generator)
    tint, background = _looks(labels[:, 1], generator)
    frames = _compose(sprites, centre[:, None], size[:, None], alpha[:, None], tint, background)
    return _bytes(frames[:, 0]), labels


def clips(
    items: Items,
    n: int,
    frames: int = 8,
    generator: torch.Generator | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """n moving clips: uint8 [n, frames, 3, 48, 48] and labels [n, 3], drawn uniformly where not given."""
    labels = random_labels(n, True, generator) if labels is None else labels
    return _bytes(_moving(items, n, frames, generator, labels)), labels


def trails(
    items: Items, n: int, generator: torch.Generator | None = None, labels: torch.Tensor | None = None, frames: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """n long exposures: the mean of a clip's frames, later ones weighing more, labelled with the motion.

    uint8 [n, 3, 48, 48] and labels [n, 3]. They teach a still-image model that motion words differ.
    """
    labels = random_labels(n, True, generator) if labels is None else labels
    weight = torch.linspace(0.15, 1, frames).square()
    weight = (weight / weight.sum()).view(-1, 1, 1, 1)
    return _bytes((_moving(items, n, frames, generator, labels) * weight).sum(1)), labels


def _moving(items: Items, n: int, frames: int, generator: torch.Generator | None, labels: torch.Tensor) -> torch.Tensor:
    """float [n, frames, 3, 48, 48] in 0..1. Every draw is made for every clip, so that it depends on no motion."""
    motion = labels[:, 2]
    sprites = items.draw(labels[:, 0], generator)
    travel = _uniform(n, 12, 24, generator)
    along = (_uniform((n, 2), -1, 1, generator)) * (14 - travel[:, None] / 2)
    rest = _uniform((n, 2), -0.5, 0.5, generator) * travel[:, None]
    base, wide = _uniform(n, 18, 26, generator), _uniform(n, 16, 32, generator)
    ratio = _uniform(n, 1.6, 2.2, generator)
    dim, faint, full = (_uniform(n, low, high, generator) for low, high in ((0.6, 1), (0, 0.15), (0.8, 1)))

    u = torch.linspace(0, 1, frames) if frames > 1 else torch.full((1,), 0.5)
    u = torch.where(_REVERSED[motion][:, None], u.flip(0), u)  # [n, T], 0..1 of the motion or backwards
    step = (u - 0.5) * travel[:, None]
    horizontal, vertical = ((motion == a) | (motion == b) for a, b in ((1, 2), (3, 4)))
    x = torch.where(horizontal[:, None], step, rest[:, :1]) + along[:, :1] + SIZE / 2
    y = torch.where(vertical[:, None], step, rest[:, 1:]) + along[:, 1:] + SIZE / 2
    scales, fades = (motion == 5) | (motion == 6), (motion == 7) | (motion == 8)
    size = torch.where(scales[:, None], base[:, None] * ratio[:, None] ** (u - 0.5), wide[:, None])
    alpha = torch.where(fades[:, None], faint[:, None] + (full - faint)[:, None] * u, dim[:, None])

    tint, background = _looks(labels[:, 1], generator)
    return _compose(sprites, torch.stack([x, y], -1), size, alpha, tint, background)


def _looks(colour: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A jittered tint [n, 3] and a dim background [n, 3, 48, 48]."""
    n = len(colour)
    tint = (_RGB[colour] + _uniform((n, 3), -0.08, 0.08, generator)).clamp(0, 1)
    coarse = _uniform((n, 3, 6, 6), 0, 1, generator) * _uniform((n, 1, 1, 1), 0.05, 0.3, generator)
    return tint, F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def _compose(
    sprites: torch.Tensor,
    centre: torch.Tensor,
    size: torch.Tensor,
    alpha: torch.Tensor,
    tint: torch.Tensor,
    background: torch.Tensor,
) -> torch.Tensor:
    """Place sprites [n, 28, 28] at centre [n, T, 2], size [n, T] (px), opacity alpha [n, T] -> [n, T, 3, 48, 48]."""
    n, frames = size.shape
    theta = torch.zeros(n, frames, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = SIZE / size
    theta[..., :, 2] = (SIZE - 2 * centre) / size[..., None]
    grid = F.affine_grid(theta.flatten(0, 1), [n * frames, 1, SIZE, SIZE], align_corners=False)
    sprite = (sprites.float() / 255)[:, None, None].expand(n, frames, 1, 28, 28).flatten(0, 1)
    value = F.grid_sample(sprite, grid, align_corners=False).view(n, frames, 1, SIZE, SIZE)
    cover = (value * 3).clamp_(max=1) * alpha[..., None, None, None]
    light = (value * 0.75 + 0.25) * tint[:, None, :, None, None]
    return torch.lerp(background[:, None].expand_as(light), light, cover)


def _uniform(shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator | None) -> torch.Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.rand(shape, generator=generator) * (high - low) + low


def _bytes(frames: torch.Tensor) -> torch.Tensor:
    return (frames * 255).round_().clamp_(0, 255).to(torch.uint8)
