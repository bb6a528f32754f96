"""Compute the tokens of videos of any length in bounded memory, one chunk of frames at a time.

A branch layer reads a tower layer's output averaged over neighbouring frames. Besides, video tokens need only the mean
of layer L-2's output over time (arXiv 2309.15785, section 3.3). Both are sums over frames, so a chunk of frames runs
through the tower's layers 0 to L-2, is added to the sums, and is discarded. Memory holds one chunk and ``steps`` time
steps of d-1 layers' states, for any number of frames.

Legend: T frames, P patches, D width, L tower layers, d branch layers; a step is one time step of the branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bt_adapter.model.time_steps import Long, TimeSteps, check_long, plan_steps
from bt_adapter.model.walk import call_branch, tower_states, without_registers
from bt_adapter.model.weights import TowerWithBranch
from bt_kernels import VisibleTokens, pool_video_tokens

# Default maximum of frames per set of tokens, as a multiple of the rows of the time table. The published procedure uses
# 2 for 100 frames. The number of trained steps is not used for it: language models are trained on one set per video.
# Splitting 32 or 64 frames into more sets loses answers; averaging the frames does not (bench/long_videos.py).
WINDOW_ROWS = 2


def plan_windows(frames: int, max_frames: int, windows: int | None = None) -> list[int]:
    """Return the number of frames of each window of a video; each window becomes one set of P+1 tokens.

    ``windows`` None: the smallest number of windows with at most ``2 * max_frames`` frames each. Otherwise that number,
    at most one per frame. Window lengths differ by at most one frame. Raises ValueError for counts below 1.
    """
    for name, value in (("frames", frames), ("windows", windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, but is {value}")
    count = -(-frames // (WINDOW_ROWS * max_frames)) if windows is None else min(windows, frames)
    edges = [i * frames // count for i in range(count + 1)]
    return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]


@torch.no_grad()
def video_tokens_streamed(
    model: TowerWithBranch,
    chunks: Iterable[Tensor],
    frames: int,
    windows: int | None = 1,
    sets: int | None = None,
    long: Long = "average",
    branch: bool = True,
) -> Tensor:
    """Compute the tokens of a video from chunks of its frames; equal to ``model.video_tokens`` for ``windows=1``.

    Args:
        model: tower and branch.
        chunks: normalised frames ``[t, 3, h, w]``, any t, on the model's device.
        frames: T, the expected number of frames. The video ends earlier if the chunks hold fewer.
        windows: number of windows, see :func:`plan_windows`; the branch treats each as a separate video.
        sets: maximum number of sets of tokens; the sets of neighbouring windows are averaged to reach it.
        long: treatment of windows with more frames than the branch was trained with: "average" neighbouring frames
            down to the trained time steps, "interpolate" the trained rows of the time table, or the "published" steps,
            trained or not; see ``bt_adapter.model.time_steps.plan_steps``.
        branch: False: each set is the mean over its frames of tower layer L-2's tokens (``frame_mean_tokens``).

    Returns:
        ``[n, P+1, D]``, n sets in temporal order, CLS last in each.

    Raises:
        ValueError: an argument is outside its range, or the chunks hold no frame.
    """
    check_long(long)
    if branch and model.config.depth < 2:
        raise ValueError(f"video tokens need a branch of depth 2 or more, but depth is {model.config.depth}")
    lengths = plan_windows(frames, model.config.max_frames, windows)
    if sets is not None and sets < 1:
        raise ValueError(f"sets must be 1 or more, but is {sets}")
    count = len(lengths) if sets is None else min(sets, len(lengths))
    means: list[_Mean] = [_Mean() for _ in range(count)]
    pieces = _Pieces(chunks)
    for number, length in enumerate(lengths):
        window = _Window(model, length, long, branch)
        for piece in pieces.take(length):
            window.add(piece)
        if window.frames:
            means[number * count // len(lengths)].add(window.tokens()[None])
    done = [mean.value for mean in means if mean.count]
    if not done:
        raise ValueError("chunks held no frame")
    return torch.cat(done)


def branch_states(model: TowerWithBranch, images: Tensor) -> Iterator[Tensor]:
    """Yield the outputs of tower layers L-d to L-2 for frames ``[t, 3, h, w]``: ``[t, 1+P, D]``, without registers.

    The first d-1 branch layers read one each; if d is 1, the output of layer L-2 alone is yielded. Each output is
    overwritten when the next one is requested.
    """
    first, stop = model.first_branch_layer, model.vision_config.num_hidden_layers - 1
    tokens = model.tower.run(images, first)
    for state in [tokens] if first == stop else tower_states(model.tower, tokens, first, stop):
        yield without_registers(state, model.vision_config)


def tokens_of_states(
    model: TowerWithBranch, rows: Tensor, states: Iterable[Tensor], steps: int, plan: TimeSteps
) -> Tensor:
    """Compute a video's tokens, ``[P+1, D]``, CLS last, from means of its frames' states.

    Args:
        model: tower and branch.
        rows: ``[1, n, 1+P, D]``, any n, whose mean is that of layer L-2's output over all frames.
        states: input of each of the first d-1 branch layers, ``[1, steps, 1+P, D]``.
        steps: number of time steps. plan: selects the rows of the time table.
    """
    visible = VisibleTokens.all(1, model.vision_config.patches, steps, rows.device)
    z = call_branch(model, states, visible, plan=plan)
    return pool_video_tokens(rows, z, visible)[0]


def mean_tokens(rows: Tensor) -> Tensor:
    """Compute a video's tokens without the branch, ``[P+1, D]``, CLS last; ``rows`` as in :func:`tokens_of_states`."""
    mean = rows[0].mean(0)
    return torch.cat([mean[1:], mean[:1]])


class _Mean:
    """A running mean over the first axis of the added tensors, in float32 or better."""

    def __init__(self) -> None:
        self.count, self.sum = 0, torch.zeros(())
        self.dtype = torch.float32

    def add(self, rows: Tensor) -> None:
        """Add rows ``[n, ...]``, n ≥ 1."""
        total = rows.sum(0, keepdim=True, dtype=torch.promote_types(rows.dtype, torch.float32))
        self.sum = total if self.count == 0 else self.sum.add_(total)
        self.count, self.dtype = self.count + len(rows), rows.dtype

    @property
    def value(self) -> Tensor:
        """The mean, ``[1, ...]``, in the dtype of the added rows."""
        return (self.sum / self.count).to(self.dtype)


class _Pieces:
    """An iterator that splits chunks at the windows' boundaries."""

    def __init__(self, chunks: Iterable[Tensor]) -> None:
        self._chunks = iter(chunks)
        self._left: Tensor | None = None

    def take(self, frames: int) -> Iterator[Tensor]:
        """Yield the next ``frames`` frames, in pieces."""
        while frames > 0:
            chunk = self._left if self._left is not None else next(self._chunks, None)
            if chunk is None:
                return
            self._left = chunk[frames:] if len(chunk) > frames else None
            yield chunk[:frames]
            frames -= len(chunk[:frames])


class _Window:
    """The running means of one window, from which its tokens are computed."""

    def __init__(self, model: TowerWithBranch, frames: int, long: Long, branch: bool) -> None:
        self.model, self.frames = model, 0
        layers = model.config.depth - 1 if branch else 0
        self.plan = plan_steps(model.config, frames, long) if branch else TimeSteps(frames, 1, 1)
        edges = self.plan.edges
        self.sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        # for each branch layer: the means of its input over the frames of each time step, in temporal order
        self.steps: list[list[_Mean]] = [[] for _ in range(layers)]
        self.whole = _Mean()

    def add(self, images: Tensor) -> None:
        """Add normalised frames ``[t, 3, h, w]``."""
        for number, x in enumerate(branch_states(self.model, images)):
            if number < len(self.steps):
                self._average(self.steps[number], x)
        self.whole.add(x)
        self.frames += len(images)

    def tokens(self) -> Tensor:
        """Compute the window's tokens, ``[P+1, D]``, CLS last."""
        whole = self.whole.value[None]
        if not self.steps:
            return mean_tokens(whole)
        return tokens_of_states(self.model, whole, self._states(), len(self.steps[0]), self.plan)

    def _states(self) -> Iterator[Tensor]:
        """Yield the input of each branch layer, ``[1, steps, 1+P, D]``, and free it."""
        for means in self.steps:
            states = torch.cat([mean.value for mean in means])[None]
            means.clear()
            yield states

    def _average(self, means: list[_Mean], x: Tensor) -> None:
        """Add frames ``[t, 1+P, D]`` to the means of their time steps."""
        start = 0
        while start < len(x):
            if not means or means[-1].count == self.sizes[len(means) - 1]:
                means.append(_Mean())
            rows = x[start : start + self.sizes[len(means) - 1] - means[-1].count]
            means[-1].add(rows)
            start += len(rows)
