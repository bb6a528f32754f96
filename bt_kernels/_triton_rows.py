"""What the Triton kernels of gathering and pooling share: rows of D adjacent elements, one program a row or a few.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FRAMES_AT_ONCE = 8  # rows of a mean that are in flight together


@triton.jit
def mean_over_frames(start, stride, count, d, inside, ACC: tl.constexpr, AT_ONCE: tl.constexpr):
    """Mean of the rows at start, start + stride, ... (``count`` of them) in ACC, [W]; 0 where there are none."""
    t = tl.arange(0, AT_ONCE)
    total = tl.zeros([d.shape[0]], ACC)
    for first in range(0, count, AT_ONCE):
        frame = (first + t).to(tl.int64)
        rows = tl.load(
            start + frame[:, None] * stride + d[None, :], mask=(frame < count)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(rows.to(ACC), 0)
    return total / tl.maximum(count, 1).to(ACC)


@triton.jit
def real_frames(frame_counts, b, T, COUNTED: tl.constexpr):
    """Frames of video b that are no padding."""
    count = T
    if COUNTED:
        count = tl.load(frame_counts + b).to(tl.int32)
    return count


@triton.jit
def layer_norm_grad(grad_normed, x, mean, rstd, weight, inside, D, ACC: tl.constexpr):
    """Gradient of a row x from that of its LayerNorm, and x normalised.

    With x̂ = (x - mean)·rstd and y = weight·dx̂: dx = rstd·(y - mean(y) - x̂·mean(y·x̂)).
    """
    normed = tl.where(inside, (x - mean) * rstd, 0.0)
    scaled = weight * grad_normed
    grad = rstd * (scaled - tl.sum(scaled, 0) / D - normed * (tl.sum(scaled * normed, 0) / D))
    return grad, normed


def accumulator(dtype: torch.dtype):
    """What sums over rows of ``dtype`` run in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The torch dtype of :func:`accumulator`."""
    return torch.promote_types(dtype, torch.float32)


def row_options(width: int, dtype: torch.dtype, rows_at_once: int = 1) -> dict:
    """Block width and warps of a kernel on whole rows: about 16 bytes a thread and row."""
    block = triton.next_power_of_2(max(width, 16))
    warps = max(1, min(8, block * dtype.itemsize // 512))
    if rows_at_once > 1 and block > 1024:
        warps = 8
    return {"W": block, "ACC": accumulator(dtype), "warps": warps}


def adjacent(tensor: Tensor) -> Tensor:
    """``tensor`` with adjacent elements in its last dimension; a copy where they are not."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def rows_by_place(index: Tensor, places: int) -> Tensor:
    """int64 ``[B, places + 1]``: the row at which a place stands in ``index``, or -1; the last one is padding's."""
    batch, tokens = index.shape
    rows = torch.full((batch, places + 1), -1, dtype=torch.int64, device=index.device)
    numbers = torch.arange(tokens, device=index.device).expand(batch, -1)
    return rows.scatter_(1, torch.where(index < 0, places, index), numbers)


def lists_by_key(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions sorted by key, and where each key's list begins: ``[M]`` and ``[count + 1]``; keys of ``count`` and
    above come last, in no list."""
    ordered, order = keys.flatten().sort(stable=True)
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    return order, torch.searchsorted(ordered, bounds)
