"""The backward of gather_embed and gather_merge in Triton; ``_triton_gather.py`` has the legend."""

from __future__ import annotations

import torch
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
    layer_norm_grad,
    mean_over_frames,
    outer_strides,
    real_frames,
    row_options,
    rows_by_place,
    sum_dtype,
)


@triton.jit
def _row_grads(
    grad, grad_normed, out, mean, rstd, weight, b, r, real, d, inside, grad_b, grad_n, normed_b, normed_n, N, D,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return the gradients of rows r, [R], of video b, [R, W], from grad and through the LayerNorm from grad_normed
    (one of which may be None), and their share of the gradients of weight and bias. Rows that are not real give zeros
    and are not read."""
    columns = d[None, :]
    used = inside[None, :] & real[:, None]
    total = tl.zeros([r.shape[0], d.shape[0]], ACC)
    if grad is not None:
        total += tl.load(grad + b * grad_b + (r * grad_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
    to_weight, to_bias = tl.zeros([d.shape[0]], ACC), tl.zeros([d.shape[0]], ACC)
    if grad_normed is not None:
        has_norm = real & (r > 0)
        used = inside[None, :] & has_norm[:, None]
        n = r - 1
        x = tl.load(out + ((b * (1 + N) + r) * D)[:, None] + columns, mask=used, other=0.0).to(ACC)
        given = tl.load(grad_normed + b * normed_b + (n * normed_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
        centre = tl.load(mean + b * N + n, mask=has_norm, other=0.0)
        scale = tl.load(rstd + b * N + n, mask=has_norm, other=0.0)
        through, normed = layer_norm_grad(given, x, centre, scale, weight, inside, D, ACC)
        total += through
        to_weight, to_bias = tl.sum(given * normed, 0), tl.sum(given, 0)
    return total, to_weight, to_bias


@triton.jit(do_not_specialize=LENGTHS)
def _merge_backward(
    grad, grad_normed, out, mean, rstd, norm_weight, tower, branch, gate, index, frame_counts, grad_branch, total,
    partials, grad_b, grad_n, normed_b, normed_n, tower_b, tower_t, tower_p, branch_b, branch_n, index_b, N, T, D,
    rows_each,
    GATE: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Compute d branch = (1 - gate)·dout, d gate = Σ dout·(m - branch) (with GATE) and the gradients of the LayerNorm.
    A program takes ``rows_each`` rows of a video, R at a time, or its CLS row, and writes its partial sums [gate,
    weight, bias]. ``total`` gets the gradients of the rows. Results that are None are not computed."""
    pid = tl.program_id(0).to(tl.int64)
    parts = 1 + tl.cdiv(N, rows_each)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    columns = d[None, :]
    keep = tl.full([W], 1.0, ACC)
    if gate is not None:
        keep = 1 - tl.load(gate + d, mask=inside, other=0.0).to(ACC)
    weight = tl.zeros([W], ACC)
    if grad_normed is not None:
        weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
    gate_sum, weight_sum, bias_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    first = tl.where(part == 0, 0, 1 + (part - 1) * rows_each)
    end = tl.where(part == 0, 1, tl.minimum(first + rows_each, 1 + N))
    video = tower + b * tower_b
    for r0 in range(first, end, R):
        r = r0 + tl.arange(0, R)
        exists = r < end
        place = tl.load(index + b * index_b + r - 1, mask=exists & (r > 0), other=0).to(tl.int32)
        real = exists & (place >= 0)
        rows, to_weight, to_bias = _row_grads(
            grad, grad_normed, out, mean, rstd, weight, b, r, real, d, inside, grad_b, grad_n, normed_b, normed_n, N, D,
            ACC,
        )  # fmt: skip
        at = ((b * (1 + N) + r) * D)[:, None] + columns
        written = exists[:, None] & inside[None, :]
        if grad_branch is not None:
            tl.store(grad_branch + at, (keep[None, :] * rows).to(grad_branch.dtype.element_ty), mask=written)
        if total is not None:
            tl.store(total + at, rows, mask=written)
        if GATE:
            used = inside[None, :] & real[:, None]
            x = tl.load(branch + b * branch_b + (r * branch_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
            token, t = (1 + place // T).to(tl.int64), (place % T).to(tl.int64)
            patch = video + (t * tower_t + token * tower_p)[:, None]
            m = tl.load(patch + columns, mask=used & (r > 0)[:, None], other=0.0).to(ACC)
            if part == 0:
                cls = mean_over_frames(video, tower_t, real_frames(frame_counts, b, T), d, inside, ACC)
                m = tl.where((r == 0)[:, None], cls[None, :], m)
            gate_sum += tl.sum(rows * (m - x), 0)
        weight_sum += to_weight
        bias_sum += to_bias
    to = partials + pid * D + d
    next_kind = tl.num_programs(0).to(tl.int64) * D
    if GATE:
        tl.store(to, gate_sum, mask=inside)
    if grad_normed is not None:
        tl.store(to + next_kind, weight_sum, mask=inside)
        tl.store(to + 2 * next_kind, bias_sum, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _sum_by_list(
    grad, grad_normed, out, mean, rstd, norm_weight, order, counts, total, partials, grad_b, grad_n, normed_b,
    normed_n, B, N, D, L, K, Q, G,
    W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sum the row gradients of each list (such as the rows of a frame) over the videos, and those of the LayerNorm's
    weight and bias unless ``grad_normed`` is None; write the gradients of the rows unless ``total`` is None. A list has
    Q·G partial sums: each takes every G-th video, and R of every Q·R rows in it."""
    pid = tl.program_id(0).to(tl.int64)
    key, c = pid // (Q * G), pid % (Q * G)
    d = tl.arange(0, W)
    inside = d < D
    weight = tl.zeros([W], ACC)
    if grad_normed is not None:
        weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
    row_sum, weight_sum, bias_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    for b in range(c // Q, B, G):
        count = tl.load(counts + b * L + key)
        for i0 in range((c % Q) * R, count, Q * R):
            i = i0 + tl.arange(0, R)
            real = i < count
            r = 1 + tl.load(order + (b * L + key) * K + i, mask=real, other=0).to(tl.int64)
            rows, to_weight, to_bias = _row_grads(
                grad, grad_normed, out, mean, rstd, weight, b, r, real, d, inside, grad_b, grad_n, normed_b, normed_n,
                N, D, ACC,
            )  # fmt: skip
            if total is not None:
                at = ((b * (1 + N) + r) * D)[:, None] + d[None, :]
                tl.store(total + at, rows, mask=real[:, None] & inside[None, :])
            row_sum += tl.sum(rows, 0)
            weight_sum += to_weight
            bias_sum += to_bias
    to = partials + pid * D + d
    next_kind = tl.num_programs(0).to(tl.int64) * D
    tl.store(to, row_sum, mask=inside)
    if grad_normed is not None:
        tl.store(to + next_kind, weight_sum, mask=inside)
        tl.store(to + 2 * next_kind, bias_sum, mask=inside)


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


class RowGrads:
    """Gradients of the rows (``grad``) and of their LayerNorm (``normed``), one of which may be None."""

    def __init__(self, grad, grad_normed=None, norm_weight=None, saved=(None, None, None)):
        self.norm = grad_normed is not None
        self.grad = None if grad is None else adjacent(grad)
        self.normed = adjacent(grad_normed) if self.norm else None
        self.weight = norm_weight.contiguous() if self.norm else None
        self.out, self.mean, self.rstd = saved if self.norm else (None, None, None)
        like = self.grad if self.grad is not None else self.normed
        self.dtype, self.device, self.width = like.dtype, like.device, like.shape[-1]

    def tensors(self) -> tuple:
        """Return the tensors in the order in which the kernels take them."""
        return self.grad, self.normed, self.out, self.mean, self.rstd, self.weight

    def strides(self) -> list[int]:
        return [*outer_strides(self.grad, 2), *outer_strides(self.normed, 2)]

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*size, dtype=dtype or self.dtype, device=self.device)


def merge_backward(grads: RowGrads, tower, branch, gate, index, frame_counts, needs) -> tuple:
    """Return the gradients of tower, branch and gate where ``needs`` is true, and of a norm's weight and bias."""
    batch, tokens = index.shape
    frames, patches = tower.shape[1], tower.shape[2] - 1
    tower, branch, index = adjacent(tower), adjacent(branch), adjacent(index)
    gate = None if gate is None else gate.contiguous()
    total = None
    if needs[0]:
        total = grads.empty(batch, 1 + tokens, grads.width, dtype=sum_dtype(grads.dtype)) if grads.norm else grads.grad
    grad_branch = grads.empty(batch, 1 + tokens, grads.width) if needs[1] else None
    # Rows per program: many, so that there are few partial sums, but enough programs for all multiprocessors.
    rows = min(64, max(16 if grads.norm else 8, triton.next_power_of_2(batch * tokens // 1024)))
    parts = 1 + triton.cdiv(tokens, rows)
    sums = grads.empty(3 if grads.norm else int(needs[2]), batch * parts, grads.width, dtype=sum_dtype(grads.dtype))
    if needs[1] or needs[2] or grads.norm:
        launch(
            _merge_backward, batch * parts, *grads.tensors(), tower, branch, gate, index, frame_counts, grad_branch,
            total if grads.norm else None, sums, *grads.strides(), *tower.stride()[:3], *branch.stride()[:2],
            index.stride(0), tokens, frames, grads.width, rows, GATE=needs[2], R=1 if grads.norm else ROWS_WITH_SUMS,
            **row_options(grads.width, grads.dtype, warps_per_sm=12 if grads.norm else 16),
        )  # fmt: skip
    grad_gate, *norm_grads = [each.sum(0).to(grads.dtype) for each in sums] or [None]
    grad_tower = None
    if needs[0]:
        grad_tower = spread(total, gate, index, frame_counts, frames, patches, tower.dtype, 1.0)
    return grad_tower, grad_branch, grad_gate if needs[2] else None, *norm_grads


def sum_by_list(grads: RowGrads, lists: RowLists, tokens: int, total: Tensor | None = None) -> tuple[Tensor, ...]:
    """Sum the row gradients of each list, ``[L, D]``, and those of the LayerNorm's weight and bias, ``[D]``.

    ``tokens`` is N. The gradients of the rows in the lists are written to ``total`` [B, 1+N, D].
    """
    batch, count, most = lists.order.shape
    each = triton.cdiv(tokens, max(count, 1))  # rows of a list, on average
    # Partial sums of about 64 rows need little memory traffic and still occupy all multiprocessors.
    parts = max(1, min(64, triton.cdiv(batch * each, 64)))
    shares = max(1, min(parts, triton.cdiv(each, 64)))
    videos = max(1, triton.cdiv(batch, parts // shares))
    groups = max(1, triton.cdiv(batch, videos))
    parts = shares * groups
    sums = grads.empty(3 if grads.norm else 1, count * parts, grads.width, dtype=sum_dtype(grads.dtype))
    launch(
        _sum_by_list, count * parts, *grads.tensors(), lists.order, lists.counts, total, sums, *grads.strides(),
        batch, tokens, grads.width, count, most, shares, groups,
        R=1 if grads.norm else ROWS_AT_ONCE,  # with a norm, 2 spilled registers on sm_100
        **row_options(grads.width, grads.dtype, warps_per_sm=12 if grads.norm else 16),
    )  # fmt: skip
    return sums[0].view(count, parts, grads.width).sum(1), *sums[1:].sum(1)


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
