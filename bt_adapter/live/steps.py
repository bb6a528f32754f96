"""Keep what a live video's tokens need of its frames, in constant memory: the last frames, or all frames so far.

A window receives, for each kept frame, the outputs of the tower layers that the branch's layers read. It gives, at any
moment, the branch's input at each time step, and the mean over time of the last of these layers.

Legend: T frames of a window, N frames so far, S time steps of the branch, P patches, D width, d branch layers. A state
is one layer's output for one frame, ``[1+P, D]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.time_steps import Long, TimeSteps, average_frames, plan_steps


class Window(Protocol):
    """The part of a live stream that its tokens stand for.

    Attributes:
        pushed: number of frames added since the last :meth:`clear`.
    """

    pushed: int

    def add(self, states: Tensor) -> None:
        """Add one frame by its states, ``[layers, 1+P, D]``."""

    def clear(self) -> None:
        """Forget all frames."""

    @property
    def frames(self) -> int:
        """Number of frames that the window stands for."""

    def nbytes(self, elements: int, dtype: torch.dtype) -> int:
        """Return the bytes of memory from the first frame on, for states of ``elements`` numbers of all layers."""

    def plan(self, config: BTAdapterConfig, long: Long) -> TimeSteps:
        """Plan the branch's time steps; the window must hold a frame."""

    def edges(self, plan: TimeSteps) -> list[int]:
        """Return the number, from 0, of each step's first frame since the start, and that of the next frame."""

    def inputs(self, plan: TimeSteps) -> Iterator[Tensor]:
        """Yield each branch layer's input, ``[1, S, 1+P, D]``."""

    def rows(self) -> Tensor:
        """Return rows ``[1, n, 1+P, D]`` whose mean over n is the last layer's mean over the window's frames."""


class SlidingWindow:
    """The last T frames, in a ring of their states; the tokens equal ``video_tokens`` of these frames.

    Args:
        frames: T.
    """

    def __init__(self, frames: int) -> None:
        self.size, self.pushed = frames, 0
        self._ring: Tensor | None = None  # [layers, T, 1+P, D]; frame n stands at n modulo T

    def add(self, states: Tensor) -> None:
        """See `Window`."""
        if self._ring is None:
            self._ring = states.new_empty(len(states), self.size, *states.shape[1:])
        self._ring[:, self.pushed % self.size] = states
        self.pushed += 1

    def clear(self) -> None:
        """See `Window`."""
        self.pushed = 0

    @property
    def frames(self) -> int:
        """See `Window`."""
        return min(self.pushed, self.size)

    def nbytes(self, elements: int, dtype: torch.dtype) -> int:
        """See `Window`."""
        return self.size * elements * dtype.itemsize

    def plan(self, config: BTAdapterConfig, long: Long) -> TimeSteps:
        """See `Window`."""
        return plan_steps(config, self.frames, long)

    def edges(self, plan: TimeSteps) -> list[int]:
        """See `Window`."""
        return [self.pushed - self.frames + edge for edge in plan.edges]

    def inputs(self, plan: TimeSteps) -> Iterator[Tensor]:
        """See `Window`."""
        assert self._ring is not None
        for layer in range(len(self._ring)):
            yield average_frames(self._in_order(layer), plan.steps)

    def rows(self) -> Tensor:
        """See `Window`."""
        return self._in_order(-1)

    def _in_order(self, layer: int) -> Tensor:
        """Return a layer's states of all frames of the window in temporal order, ``[1, T, 1+P, D]``."""
        assert self._ring is not None
        if self.pushed <= self.size:
            return self._ring[layer, None, : self.pushed]
        return self._ring[layer].roll(-(self.pushed % self.size), 0)[None]


class WholeWindow:
    """All frames so far, as running means of blocks of neighbouring frames, in the memory of 2·T blocks.

    All blocks have b frames, a power of two, only the newest may have fewer. When 2·T blocks are full and a frame
    arrives, neighbouring blocks are averaged in pairs, and b doubles. After N frames, therefore,

    ``b`` = the smallest power of two with ``2·T·b ≥ N``, and ``m = ceil(N / b)`` blocks, T < m ≤ 2·T once N > T.

    Step s of the branch's S time steps begins at frame ``min(N, b · ceil(s·N / (S·b)))``: where it begins for
    ``video_tokens`` of all N frames, ceil(s·N / S), rounded up to a block, which is less than N / T frames later. The
    steps are equal for N ≤ 2·T, and whenever N is a multiple of b·S. No scheme of constant memory has them equal for
    every N: step 1 begins at frame ceil(N / S), so that each frame is at some time the first of a step. A step is the
    mean of its frames, and the mean over time always includes all N frames equally.

    Args:
        frames: T. A larger T rounds the boundaries less.
    """

    def __init__(self, frames: int) -> None:
        self.size, self.pushed = frames, 0
        self.block = 1  # b
        self._full = 0  # full blocks
        self._blocks: Tensor | None = None  # means [layers, 2·T, 1+P, D] of the full blocks
        self._open: Tensor | None = None  # sums [layers, 1+P, D] over the newest block, in float64

    def add(self, states: Tensor) -> None:
        """See `Window`."""
        if self._blocks is None or self._open is None:
            dtype = torch.promote_types(states.dtype, torch.float32)
            self._blocks = states.new_empty(len(states), 2 * self.size, *states.shape[1:], dtype=dtype)
            self._open = torch.zeros_like(states, dtype=torch.float64)
        if self._full == 2 * self.size:
            self._merge(self._blocks)
        if self.pushed % self.block == 0:
            self._open.zero_()
        self._open += states
        self.pushed += 1
        if self.pushed % self.block == 0:
            self._blocks[:, self._full] = self._open / self.block
            self._full += 1

    def clear(self) -> None:
        """See `Window`."""
        self.pushed = self._full = 0
        self.block = 1

    @property
    def frames(self) -> int:
        """See `Window`."""
        return self.pushed

    def nbytes(self, elements: int, dtype: torch.dtype) -> int:
        """See `Window`."""
        blocks = 2 * self.size * torch.promote_types(dtype, torch.float32).itemsize
        return elements * (blocks + torch.float64.itemsize)

    def plan(self, config: BTAdapterConfig, long: Long) -> TimeSteps:
        """See `Window`; there are at most as many steps as blocks."""
        return plan_steps(config, -(-self.pushed // self.block), long)

    def edges(self, plan: TimeSteps) -> list[int]:
        """See `Window`."""
        return [min(self.pushed, self.block * edge) for edge in self._block_edges(plan.steps)]

    def inputs(self, plan: TimeSteps) -> Iterator[Tensor]:
        """See `Window`."""
        assert self._blocks is not None
        for layer in range(len(self._blocks)):
            yield self._means(layer, self._block_edges(plan.steps))

    def rows(self) -> Tensor:
        """See `Window`."""
        return self._means(-1, self._block_edges(1))

    def _block_edges(self, steps: int) -> list[int]:
        """Return the first block of each step, and the number of blocks."""
        return [-(-step * self.pushed // (steps * self.block)) for step in range(steps + 1)]

    def _merge(self, blocks: Tensor) -> None:
        """Average neighbouring full blocks in pairs, one layer at a time."""
        for means in blocks:
            means[: self.size] = (means[0::2] + means[1::2]) / 2
        self._full = self.size
        self.block *= 2

    def _means(self, layer: int, edges: list[int]) -> Tensor:
        """Return a layer's means over the frames of the blocks between neighbouring edges, ``[1, n, 1+P, D]``."""
        assert self._blocks is not None and self._open is not None
        means = []
        for start, stop in zip(edges, edges[1:], strict=False):
            total = self._blocks[layer, start : min(stop, self._full)].sum(0, dtype=torch.float64) * self.block
            if stop > self._full:
                total += self._open[layer]
            means.append(total / (min(self.pushed, stop * self.block) - start * self.block))
        return torch.stack(means)[None].to(self._blocks.dtype)
