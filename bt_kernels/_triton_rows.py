"""Helpers of the Triton kernels that gather and pool rows of D adjacent elements; a program takes one row or a few.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch

FRAMES_AT_ONCE = tl.constexpr(8)  # rows of a mean that are loaded together
# Rows that a program of a gather loads together, to overlap their reads: four where it only adds them up, two where it
# needs several values of each or they are wider than 16 bits. The register counts of bench/resources.py decided.
ROWS_AT_ONCE, ROWS_WITH_SUMS = 4, 2

# Arguments of all kernels that count something, or are strides of index or of a frame's weight. No address is aligned
# to their values, so kernels are not compiled anew for values that are 1 or multiples of 16.
LENGTHS = ("B", "T", "P", "N", "S", "K", "L", "Q", "G", "U", "H", "blocks", "tiles", "entries", "first", "row_count",
           "rows_each", "rows_of_video", "index_b", "weight_b", "weight_s", "weighted")  # fmt: skip


@triton.jit
def mean_over_frames(start, stride, count, d, inside, ACC: tl.constexpr):
    """Average ``count`` rows at start, start + stride, ... in ACC: [W], zeros if there are none."""
    t = tl.arange(0, FRAMES_AT_ONCE)
    total = tl.zeros([d.shape[0]], ACC)
    for first in range(0, count, FRAMES_AT_ONCE):
        frame = (first + t).to(tl.int64)
        rows = tl.load(
            start + frame[:, None] * stride + d[None, :], mask=(frame < count)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(rows.to(ACC), 0)
    return total / tl.maximum(count, 1).to(ACC)


@triton.jit
def real_frames(frame_counts, b, T):
    """Return the number of real frames of video b, without padding, in [0, T]."""
    count = T
    if frame_counts is not None:
        # A wrong count must not cause reads past the tensor.
        count = tl.minimum(tl.maximum(tl.load(frame_counts + b), 0), T).to(tl.int32)
    return count


@triton.jit
def layer_norm(x, inside, D, eps):
    """Return rows x, [R, W], normalised (without weight and bias), with mean and 1/deviation of each row, [R]."""
    mean = tl.sum(x, 1) / D
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def layer_norm_grad(grad_normed, x, mean, rstd, weight, inside, D, ACC: tl.constexpr):
    """Return the gradients of rows x, [R, W], from those of their LayerNorm, and the normalised rows.

    mean and rstd are [R]. With x̂ = (x - mean)·rstd and y = weight·dx̂: dx = rstd·(y - mean(y) - x̂·mean(y·x̂)).
    """
    normed = tl.where(inside[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
    scaled = weight[None, :] * grad_normed
    through = scaled - (tl.sum(scaled, 1) / D)[:, None] - normed * (tl.sum(scaled * normed, 1) / D)[:, None]
    return rstd[:, None] * through, normed


@triton.jit
def activation(y, ACT: tl.constexpr):
    """Return act(y) / y, between 0 and 1, and its derivative in y."""
    if ACT == "gelu":  # the normal distribution
        share = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * y * y)
    elif ACT == "gelu_pytorch_tanh":  # ½(1 + tanh(u)) = sigmoid(2u)
        square = y * y
        share = tl.sigmoid(1.5957691216057308 * y * (1 + 0.044715 * square))
        slope = share * (1 - share) * (1.5957691216057308 * (1 + 0.134145 * square))
    else:
        share = tl.sigmoid(1.702 * y)
        slope = share * (1 - share) * 1.702
    return share, slope


@triton.jit(do_not_specialize=LENGTHS)
def list_rows(
    index, order, other, counts, index_b, N, T, L, K, BY_FRAME: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """List the rows of each frame (or patch) of a video in ascending order, with their number and, unless ``other`` is
    None, the patch (or frame) of each. A program makes one list of at most K rows and scans C rows at a time."""
    pid = tl.program_id(0).to(tl.int64)
    b, key = pid // L, pid % L
    found = tl.zeros([], tl.int32)
    for n0 in range(0, N, C):
        n = n0 + tl.arange(0, C)
        place = tl.load(index + b * index_b + n, mask=n < N, other=-1)
        if BY_FRAME:
            row_key, rest = place % T, place // T
        else:
            row_key, rest = place // T, place % T
        hit = (place >= 0) & (row_key == key)
        at = found + tl.cumsum(hit.to(tl.int32), 0) - 1
        keep = hit & (at < K)
        tl.store(order + pid * K + at, n, mask=keep)
        if other is not None:
            tl.store(other + pid * K + at, rest.to(tl.int32), mask=keep)
        found += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + pid, tl.minimum(found, K))


def accumulator(dtype: torch.dtype):
    """Return the Triton dtype of sums over rows of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the torch dtype of :func:`accumulator`."""
    return torch.promote_types(dtype, torch.float32)


def row_options(
    width: int, dtype: torch.dtype, rows_at_once: int = 1, warps_per_sm: int | Mapping[int, int] = 16
) -> dict:
    """Choose block width and warps of a kernel on whole rows: about 16 bytes per thread and row.

    ``warps_per_sm`` is that of :func:`bt_kernels._triton.launch`.
    """
    block = triton.next_power_of_2(max(width, 16))
    warps = max(1, min(8, block * dtype.itemsize // 512))
    if rows_at_once > 1 and block > 1024:
        warps = 8
    return {"W": block, "ACC": accumulator(dtype), "warps": warps, "warps_per_sm": warps_per_sm}


def rows_per_sum(rows: int) -> int:
    """Return how many rows a program of a backward adds up into one partial sum of the weights' gradients.

    Many, so that the partial sums add little traffic, but so few that ``rows`` rows make about 256 programs.
    """
    return min(128, max(32, triton.next_power_of_2(rows // 256)))


def adjacent(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy of it if the elements of its last dimension are not adjacent."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def outer_strides(tensor: Tensor | None, count: int) -> list[int]:
    """Return the first ``count`` strides; zeros for None."""
    return [0] * count if tensor is None else list(tensor.stride()[:count])


def rows_by_place(index: Tensor, places: int) -> Tensor:
    """Invert ``index``: int64 ``[B, places + 1]``, the row of each place or -1; the last entry is for padding."""
    batch, tokens = index.shape
    rows = torch.full((batch, places + 1), -1, dtype=torch.int64, device=index.device)
    numbers = torch.arange(tokens, device=index.device).expand(batch, -1)
    return rows.scatter_(1, torch.where(index < 0, places, index), numbers)


@dataclass(frozen=True)
class RowLists:
    """Lists of the rows of each frame, or of each patch, of every video, made without a sort or a device wait.

    Attributes:
        order: int32 ``[B, L, K]``: L lists of at most K rows (0 the first patch row) in ascending order.
        counts: int32 ``[B, L]``: their lengths; later entries of ``order`` are undefined.
        patches: int32 ``[B, L, K]``: the patch of each row, if :meth:`by_frame` was called with ``name_patches``.
    """

    order: Tensor
    counts: Tensor
    patches: Tensor | None = None

    @staticmethod
    def by_frame(index: Tensor, patches: int, frames: int, name_patches: bool = False) -> RowLists:
        """List the rows of each frame: L = T lists of at most P rows."""
        return _lists(index, frames, frames, patches, by_frame=True, named=name_patches)

    @staticmethod
    def by_patch(index: Tensor, patches: int, frames: int) -> RowLists:
        """List the rows of each patch: L = P lists of at most T rows."""
        return _lists(index, frames, patches, frames, by_frame=False, named=False)


def _lists(index: Tensor, frames: int, lists: int, most: int, by_frame: bool, named: bool) -> RowLists:
    batch, tokens = index.shape
    index = adjacent(index)
    order = index.new_empty(batch, lists, most, dtype=torch.int32)
    other = torch.empty_like(order) if named else None
    counts = index.new_empty(batch, lists, dtype=torch.int32)
    launch(
        list_rows, batch * lists, index, order, other, counts, index.stride(0), tokens, frames, lists, most,
        BY_FRAME=by_frame, C=1024,
    )  # fmt: skip
    return RowLists(order, counts, other)
