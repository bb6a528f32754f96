"""Chooses the frames of a video that the model reads."""

from __future__ import annotations

import sys
from typing import Any

import torch

SAMPLINGS = ("middle", "random", "reference")


def sample_indices(
    total: int, frames: int, sampling: str = "middle", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Choose `frames` out of `total` frames: one from each of `frames` equal segments.

    Segment i is `[i·x, (i+1)·x)` with `x = total / frames`; frame f belongs to the segment that contains its
    centre f + 1/2, so every frame belongs to exactly one segment.

    - `"middle"` (evaluation): the frame at the segment's middle, `floor((i + 1/2)·x)`.
    - `"random"` (training): a frame drawn uniformly from the segment.
    - `"reference"`: the evaluation rule of the published retrieval and recognition scores (mmaction2's
      UniformSample): `round(i·y) + floor(y / 2)` with `y = (total - 1) / frames`, ties to even. It is within
      two frames of `"middle"`, and repeats a frame if `frames` is close to `total`.

    With `total == frames`, `"middle"` and `"random"` take every frame once. With `total < frames` there is
    less than one frame per segment: `"random"` then equals `"middle"`, and frames repeat, evenly spread.

    Args:
        total: number of available frames, at least 1.
        frames: number of requested frames, at least 1.
        sampling: "middle", "random" or "reference".
        generator: random generator for "random"; torch's global one if None.

    Returns:
        int64 tensor `[frames]`, ascending, in `[0, total)`, on the CPU.

    Raises:
        TypeError: `total` or `frames` is not an integer.
        ValueError: `total` or `frames` below 1, or an unknown `sampling`.
    """
    check_count("total", total)
    check_count("frames", frames)
    check_sampling(sampling)
    if sampling == "reference":
        step = (total - 1) / frames
        return torch.tensor([round(step * i) + int(step / 2) for i in range(frames)])
    if sampling == "middle" or total < frames:
        return torch.tensor([(2 * i + 1) * total // (2 * frames) for i in range(frames)])
    # First frame of segment i: the least f with f + 1/2 >= i·x, in integers so that rounding loses no frame.
    first = [-((frames - 2 * i * total) // (2 * frames)) for i in range(frames + 1)]
    device = generator.device if generator is not None else "cpu"
    drawn = [
        lo + int(torch.randint(hi - lo, (), generator=generator, device=device))
        for lo, hi in zip(first, first[1:], strict=False)
    ]
    return torch.tensor(drawn)


def check_count(name: str, value: int, error: type[ValueError] = ValueError) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} ({value!r})")
    if value < 1:
        raise error(f"{name} must be at least 1, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a number above 0, but is {value!r}")


def check_sampling(sampling: str) -> None:
    """Raise unless `sampling` names one of the rules of `sample_indices`."""
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}")
