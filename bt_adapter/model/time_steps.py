"""Convert the frames of a video to the branch's time steps without reading untrained rows of its time table.

Each time step adds a row of the time table. Training with S steps trains the first S rows; the others keep their random
initial values, and a branch that reads them gives wrong answers. ``BTAdapterConfig.trained_steps`` records S. For a
video of more frames, neighbouring frames are averaged down to S steps, or rows are interpolated from trained ones.

Legend: B videos, T frames, P patches, D width, S time steps, R rows of the time table.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.model.config import BTAdapterConfig
from bt_kernels import VisibleTokens

Long = Literal["average", "interpolate", "published"]
# Interpolation extends the trained rows to at most this multiple of their number; longer videos are averaged first.
STRETCH = 2
# Published pretraining uses 8 frames, which is also this package's default; published tuning 100, averaged to 50.
PRETRAINED_STEPS = 8
TUNED_FRAMES = 100


@dataclass(frozen=True)
class TimeSteps:
    """The time steps of one video.

    Attributes:
        frames: T. steps: S, at most T; step s is the mean of the frames between `edges` s and s + 1.
        rows: R, number of first rows of the time table that may be read; if S is larger, they are interpolated to S.
    """

    frames: int
    steps: int
    rows: int

    @property
    def edges(self) -> list[int]:
        """First frame of each step, and T; the lengths of steps differ by at most one frame, and none is empty."""
        return [-(-step * self.frames // self.steps) for step in range(self.steps + 1)]


def plan_steps(config: BTAdapterConfig, frames: int, long: Long = "average") -> TimeSteps:
    """Plan the time steps of a video of ``frames`` frames.

    Args:
        config: configuration of the branch. If its ``trained_steps`` is None, all rows of its time table are assumed to
            be trained, with a warning for videos of more steps than published pretraining had.
        frames: T.
        long: treatment of a video with more frames than trained steps. "average": average neighbouring frames down to
            the trained steps. "interpolate": interpolate the trained rows to the number of frames, at most `STRETCH`
            times their number (longer videos are averaged down to that first). "published": the published code's steps,
            which read all rows as stored, trained or not; more frames than rows are averaged in pairs, triples, etc.

    Raises:
        ValueError: ``long`` is none of these.
    """
    check_long(long)
    rows = config.max_frames if long == "published" or config.trained_steps is None else config.trained_steps
    limit = rows * (STRETCH if long == "interpolate" else 1)
    if long == "published" or config.trained_steps is None:
        steps = published_steps(frames, limit)
    else:
        steps = min(frames, limit)
    if config.trained_steps is None and long != "published" and steps > PRETRAINED_STEPS:
        warnings.warn(
            f"the branch does not say how many time steps it was trained with (trained_steps is None): all {rows} "
            f"rows of its time table are taken as trained, and {min(steps, rows)} are read. If it was trained with "
            f"fewer, set trained_steps of the model ({PRETRAINED_STEPS} after pretraining with as many frames)",
            stacklevel=3,
        )
    return TimeSteps(frames, steps, rows)


def check_long(long: str) -> None:
    """Raise a ValueError if ``long`` is not a known treatment of long videos."""
    if long not in get_args(Long):
        raise ValueError(f"long must be 'average', 'interpolate' or 'published', but is {long!r}")


def check_trained(config: BTAdapterConfig, visible: VisibleTokens) -> None:
    """Raise a ValueError if visible tokens chosen by the caller have frames beyond the trained time steps.

    Padding frames of shorter videos are not read, so they are allowed there.
    """
    limit = config.trained_steps or config.max_frames
    frames, counts = visible.frames, visible.frame_counts
    if frames <= limit:
        return
    if counts is not None and frames <= config.max_frames and (frames := int(counts.max())) <= limit:
        return
    how = "was trained with" if config.trained_steps else "has a time table for"
    raise ValueError(
        f"visible holds tokens of {frames} frames, but the branch {how} {limit} time steps: leave visible out, and "
        "neighbouring frames are averaged; or give fewer frames; or, to train it with more (at most "
        f"{config.max_frames}), set trained_steps of the model first"
    )


def published_steps(frames: int, rows: int) -> int:
    """Return the published code's number of time steps: 100 frames with 64 rows are averaged in pairs to 50."""
    return -(-frames // -(-frames // rows))


def average_frames(tokens: Tensor, steps: int) -> Tensor:
    """Average neighbouring frames, ``[B, T, 1+P, D]`` to ``[B, steps, 1+P, D]``, see :class:`TimeSteps`."""
    frames = tokens.shape[1]
    if frames == steps:
        return tokens
    if frames % steps == 0:
        return tokens.unflatten(1, (steps, -1)).mean(2)
    edges = TimeSteps(frames, steps, steps).edges
    sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    return torch.cat([part.mean(1, keepdim=True) for part in tokens.split(sizes, 1)], 1)


def time_rows(table: Tensor, plan: TimeSteps) -> Tensor:
    """Return the rows for a plan's steps: the table ``[R, D]``, or its trained rows interpolated to ``[S, D]``."""
    if plan.steps <= plan.rows:
        return table
    trained = table[: plan.rows].T[None].float()  # [1, D, rows]
    if plan.rows == 1:
        return table[:1].expand(plan.steps, -1).contiguous()
    return F.interpolate(trained, plan.steps, mode="linear", align_corners=True)[0].T.to(table.dtype).contiguous()


def read_branch_config(stored: Mapping[str, Any], source: Any) -> BTAdapterConfig:
    """Read the configuration from a saved branch's ``config.json``.

    For a folder without ``trained_steps``, pretraining with 8 frames, this package's default, is assumed, with a
    warning that names ``source``. At worst, fewer rows are read than were trained.
    """
    config = BTAdapterConfig(**stored)
    if "trained_steps" in stored:
        return config
    assumed = min(PRETRAINED_STEPS, config.max_frames)
    warnings.warn(
        f"{source} does not say how many time steps the branch was trained with: {assumed} are assumed, to which the "
        f'frames of longer videos are averaged. Write "trained_steps" into "branch" of its config.json',
        stacklevel=3,
    )
    return replace(config, trained_steps=assumed)


def published_trained_steps(
    names: Collection[str], branch_alone: bool, rows: int, trained_frames: int | None
) -> int | None:
    """Determine the number of time steps that a published checkpoint was trained with.

    Args:
        names: names of its tensors in the file.
        branch_alone: whether it lacks the tower.
        rows: number of rows of its time table.
        trained_frames: number of frames of its training videos; None: inferred from the kind of file. Pretraining files
            have 8 frames, files of instruction tuning (with only the branch) 100, averaged to 50 steps.

    Returns:
        The number; None, with a warning, for a file for chat or stored features, which may come from either.

    Raises:
        ValueError: ``trained_frames`` is below 1.
    """
    if trained_frames is not None and (not isinstance(trained_frames, int) or trained_frames < 1):
        raise ValueError(f"trained_frames must be a positive int, but is {trained_frames!r}")
    if trained_frames is None:
        if any(name.startswith(("backbone.", "extra_proj.", "text_backbone.")) for name in names):
            trained_frames = PRETRAINED_STEPS
        elif branch_alone:
            trained_frames = TUNED_FRAMES
        else:
            warnings.warn(
                "the checkpoint does not say how many frames it was trained with, as files for chat do not: all "
                f"{rows} rows of its time table are taken as trained. Give trained_frames= (published pretraining: "
                f"{PRETRAINED_STEPS}, published tuning: {TUNED_FRAMES}), and save_pretrained records it",
                stacklevel=3,
            )
            return None
    return published_steps(trained_frames, rows)
