"""The backward of gather_embed and gather_merge in Triton; ``_triton_gather.py`` has the legend."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import (
    LENGTHS,
    ROWS_AT_ONCE,
    ROWS_WITH_SUMS,
    RowLists,
    adjacent,
    mean_over_frames,
    real_frames,
    row_options,
    rows_by_place,
    sum_dtype,
)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_backward(
    grad, tower, branch, gate, index, frame_counts, grad_branch, partials, grad_b, grad_n, tower_b, tower_t, tower_p,
    branch_b, branch_n, index_b, N, T, D, rows_each,
    GATE: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Compute d branch = (1 - gate)·dout and, with GATE, d gate = Σ dout·(m - branch). A program takes ``rows_each``
    rows of a video, R at a time, or its CLS row, and writes its partial sum of d gate. Rows of index -1 give zeros and
    are not read. ``grad_branch`` is not computed if it is None."""
    pid = tl.program_id(0).to(tl.int64)
    parts = 1 + tl.cdiv(N, rows_each)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    columns = d[None, :]
    keep = tl.full([W], 1.0, ACC)
    if gate is not None:
        keep = 1 - tl.load(gate + d, mask=inside, other=0.0).to(ACC)
    gate_sum = tl.zeros([W], ACC)
    first = tl.where(part == 0, 0, 1 + (part - 1) * rows_each)
    end = tl.where(part == 0, 1, tl.minimum(first + rows_each, 1 + N))
    video = tower + b * tower_b
    for r0 in range(first, end, R):
        r = r0 + tl.arange(0, R)
        exists = r < end
        place = tl.load(index + b * index_b + r - 1, mask=exists & (r > 0), other=0).to(tl.int32)
        real = exists & (place >= 0)
        used = inside[None, :] & real[:, None]
        rows = tl.load(grad + b * grad_b + (r * grad_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
        if grad_branch is not None:
            at = ((b * (1 + N) + r) * D)[:, None] + columns
            written = exists[:, None] & inside[None, :]
            tl.store(grad_branch + at, (keep[None, :] * rows).to(grad_branch.dtype.element_ty), mask=written)
        if GATE:
            x = tl.load(branch + b * branch_b + (r * branch_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
            token, t = (1 + place // T).to(tl.int64), (place % T).to(tl.int64)
            patch = video + (t * tower_t + token * tower_p)[:, None]
            m = tl.load(patch + columns, mask=used & (r > 0)[:, None], other=0.0).to(ACC)
            if part == 0:
                cls = mean_over_frames(video, tower_t, real_frames(frame_counts, b, T), d, inside, ACC)
                m = tl.where((r == 0)[:, None], cls[None, :], m)
            gate_sum += tl.sum(rows * (m - x), 0)
    if GATE:
        tl.store(partials + pid * D + d, gate_sum, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _sum_by_list(
    grad, order, counts, partials, grad_b, grad_n, B, N, D, L, K, Q, G,
    W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of each list's rows (such as the rows of a frame) over the videos. A list has Q·G partial sums:
    each takes every G-th video, and R of every Q·R rows in it."""
    pid = tl.program_id(0).to(tl.int64)
    key, c = pid // (Q * G), pid % (Q * G)
    d = tl.arange(0, W)
    inside = d < D
    row_sum = tl.zeros([W], ACC)
    for b in range(c // Q, B, G):
        count = tl.load(counts + b * L + key)
        for i0 in range((c % Q) * R, count, Q * R):
            i = i0 + tl.arange(0, R)
            real = i < count
            r = 1 + tl.load(order + (b * L + key) * K + i, mask=real, other=0).to(tl.int64)
            used = inside[None, :] & real[:, None]
            rows = tl.load(grad + b * grad_b + (r * grad_n)[:, None] + d[None, :], mask=used, other=0.0)
            row_sum += tl.sum(rows.to(ACC), 0)
    tl.store(partials + pid * D + d, row_sum, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _spread(
    grad, gate, rows, frame_counts, grad_tower, grad_b, grad_n, T, P, D, scale_cls,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the tower's gradient, each token once: that of its row, for CLS its share of the mean, or zero."""
    pid = tl.program_id(0).to(tl.int64)
    token, frame = pid % (1 + P), pid // (1 + P)
    b, t = frame // T, frame % T
    d = tl.arange(0, W)
    inside = d < D
    count = real_frames(frame_counts, b, T)
    n = tl.load(rows + b * (P * T + 1) + (token - 1) * T + t, mask=token > 0, other=-1)
    real_cls = (token == 0) & (t < count)
    row = tl.where(token == 0, 0, 1 + n)
    value = tl.load(grad + b * grad_b + row * grad_n + d, mask=inside & (real_cls | (n >= 0)), other=0.0).to(ACC)
    value *= tl.where(token == 0, scale_cls / tl.maximum(count, 1).to(ACC), 1.0)
    if gate is not None:
        value *= tl.load(gate + d, mask=inside, other=0.0).to(ACC)
    tl.store(grad_tower + pid * D + d, value.to(grad_tower.dtype.element_ty), mask=inside)


def merge_backward(
    grad, tower, branch, gate, index, frame_counts, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of tower, branch and gate where ``needs`` is true, from that of the rows, ``grad``."""
    batch, tokens = index.shape
    frames, patches, width = tower.shape[1], tower.shape[2] - 1, grad.shape[-1]
    grad, tower, branch, index = adjacent(grad), adjacent(tower), adjacent(branch), adjacent(index)
    gate = None if gate is None else gate.contiguous()
    grad_branch = grad.new_empty(grad.shape) if needs[1] else None
    # Rows per program: many, so that there are few partial sums, but enough programs for all multiprocessors.
    rows = min(64, max(8, triton.next_power_of_2(batch * tokens // 1024)))
    programs = batch * (1 + triton.cdiv(tokens, rows))
    sums = grad.new_empty(programs, width, dtype=sum_dtype(grad.dtype)) if needs[2] else None
    if needs[1] or needs[2]:
        launch(
            _merge_backward, programs, grad, tower, branch, gate, index, frame_counts, grad_branch, sums,
            *grad.stride()[:2], *tower.stride()[:3], *branch.stride()[:2], index.stride(0), tokens, frames, width, rows,
            GATE=sums is not None, R=ROWS_WITH_SUMS, **row_options(width, grad.dtype, warps_per_sm=16),
        )  # fmt: skip
    grad_tower = spread(grad, gate, index, frame_counts, frames, patches, tower.dtype, 1.0) if needs[0] else None
    return grad_tower, grad_branch, None if sums is None else sums.sum(0).to(grad.dtype)


def sum_by_list(grad: Tensor, lists: RowLists, tokens: int) -> Tensor:
    """Sum the gradients of each list's rows, ``[L, D]``, from those of all rows, ``[B, 1+N, D]``; ``tokens`` is N."""
    batch, count, most = lists.order.shape
    width = grad.shape[-1]
    each = triton.cdiv(tokens, max(count, 1))  # rows of a list, on average
    # Partial sums of about 64 rows need little memory traffic and still occupy all multiprocessors.
    parts = max(1, min(64, triton.cdiv(batch * each, 64)))
    shares = max(1, min(parts, triton.cdiv(each, 64)))
    videos = max(1, triton.cdiv(batch, parts // shares))
    groups = max(1, triton.cdiv(batch, videos))
    parts = shares * groups
    sums = grad.new_empty(count * parts, width, dtype=sum_dtype(grad.dtype))
    launch(
        _sum_by_list, count * parts, grad, lists.order, lists.counts, sums, *grad.stride()[:2], batch, tokens, width,
        count, most, shares, groups, R=ROWS_AT_ONCE, **row_options(width, grad.dtype, warps_per_sm=16),
    )  # fmt: skip
    return sums.view(count, parts, width).sum(1)


def spread(grad, gate, index, frame_counts, frames, patches, dtype, cls_scale) -> Tensor:
    """Return the gradient of the tower's tokens ``[B, T, 1+P, D]`` from that of the rows ``[B, 1+N, D]``."""
    batch, tokens = index.shape
    grad = adjacent(grad)
    grad_tower = grad.new_empty(batch, frames, 1 + patches, grad.shape[-1], dtype=dtype)
    launch(
        _spread, batch * frames * (1 + patches), grad, gate, rows_by_place(index, patches * frames), frame_counts,
        grad_tower, *grad.stride()[:2], frames, patches, grad.shape[-1], cls_scale,
        **row_options(grad.shape[-1], grad.dtype),
    )  # fmt: skip
    return grad_tower
