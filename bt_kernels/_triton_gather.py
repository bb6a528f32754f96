"""The Triton kernels behind gather_embed and gather_merge: one family, told apart by compile-time constants.

With m the tower's row (CLS: mean over the real frames):
    embed: out = m + pos[1+p] + time[t],          CLS: ½(m + cls + pos[0])
    merge: out = (1 - gate)·branch + gate·m, or branch + m
and with NORM the patch rows of out, as rounded, normalised too. Rows of index -1 are zeros and read nothing.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two, R rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import (
    FRAMES_AT_ONCE,
    adjacent,
    layer_norm_grad,
    lists_by_key,
    mean_over_frames,
    real_frames,
    row_options,
    rows_by_place,
    wide,
)


@triton.jit
def _forward(
    tower, branch, gate, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, out, normed, mean, rstd,
    tower_b, tower_t, tower_p, branch_b, branch_n, pos_stride, time_stride, index_b, index_n, N, T, D, eps,
    EMBED: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, COUNTED: tl.constexpr, W: tl.constexpr,
    ACC: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program a row of out."""
    pid = tl.program_id(0).to(tl.int64)
    b, r = pid // (1 + N), pid % (1 + N)
    d = tl.arange(0, W)
    inside = d < D
    video = tower + b * tower_b
    if r == 0:
        count = real_frames(frame_counts, b, T, COUNTED)
        value = mean_over_frames(video, tower_t, count, d, inside, ACC, AT_ONCE)
        place = tl.zeros([], tl.int64)
    else:
        place = tl.load(index + b * index_b + (r - 1) * index_n)
        at = video + (place % T) * tower_t + (1 + place // T) * tower_p
        value = tl.load(at + d, mask=inside & (place >= 0), other=0.0).to(ACC)
    real = place >= 0
    used = inside & real
    if EMBED:
        token = tl.where(r == 0, 0, 1 + place // T)
        value += tl.load(pos + token * pos_stride + d, mask=used, other=0.0).to(ACC)
        if r == 0:
            value = 0.5 * (value + tl.load(cls_token + d, mask=inside, other=0.0).to(ACC))
        else:
            value += tl.load(time + (place % T) * time_stride + d, mask=used, other=0.0).to(ACC)
    else:
        x = tl.load(branch + b * branch_b + r * branch_n + d, mask=used, other=0.0).to(ACC)
        if GATED:
            w = tl.load(gate + d, mask=inside, other=0.0).to(ACC)
            value = (1 - w) * x + w * value
        else:
            value += x
    kind = out.dtype.element_ty
    value = tl.where(real, value, 0.0).to(kind)
    tl.store(out + pid * D + d, value, mask=inside)
    if NORM:
        if r > 0:
            x = value.to(ACC)
            centre = tl.sum(x, 0) / D
            apart = tl.where(inside, x - centre, 0.0)
            scale = 1 / tl.sqrt(tl.sum(apart * apart, 0) / D + eps)
            weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
            bias = tl.load(norm_bias + d, mask=inside, other=0.0).to(ACC)
            n = b * N + r - 1
            row = tl.where(real, apart * scale * weight + bias, 0.0)
            tl.store(normed + n * D + d, row.to(kind), mask=inside)
            tl.store(mean + n, centre)
            tl.store(rstd + n, scale)


@triton.jit
def _row_grad(
    grad, grad_normed, out, mean, rstd, weight, b, r, real, d, inside, grad_b, grad_n, normed_b, normed_n, N, D,
    NORM: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of row r of video b from its own and its LayerNorm's; and what it adds to weight's and bias's."""
    used = inside & real
    total = tl.zeros([d.shape[0]], ACC)
    if GRAD:
        total += tl.load(grad + b * grad_b + r * grad_n + d, mask=used, other=0.0).to(ACC)
    to_weight = tl.zeros([d.shape[0]], ACC)
    to_bias = tl.zeros([d.shape[0]], ACC)
    if NORM:
        has_norm = real & (r > 0)
        used = inside & has_norm
        n = b * N + r - 1
        x = tl.load(out + (b * (1 + N) + r) * D + d, mask=used, other=0.0).to(ACC)
        to_bias = tl.load(grad_normed + b * normed_b + (r - 1) * normed_n + d, mask=used, other=0.0).to(ACC)
        centre = tl.load(mean + n, mask=has_norm, other=0.0)
        scale = tl.load(rstd + n, mask=has_norm, other=0.0)
        through, normed = layer_norm_grad(to_bias, x, centre, scale, weight, inside, D, ACC)
        total += tl.where(has_norm, through, 0.0)
        to_weight = to_bias * normed
    return total, to_weight, to_bias


@triton.jit
def _merge_backward(
    grad, grad_normed, tower, branch, gate, norm_weight, index, frame_counts, out, mean, rstd, grad_branch, total,
    partials, grad_b, grad_n, normed_b, normed_n, tower_b, tower_t, tower_p, branch_b, branch_n, index_b, index_n,
    N, T, D, R, parts, rows_of_partials,
    GATED: tl.constexpr, NORM: tl.constexpr, GRAD: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr,
    TOTAL: tl.constexpr, COUNTED: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """d branch = (1 - gate)·dout, d gate = Σ dout·(m - branch), both LayerNorm sums. A program takes R rows of a video,
    or its CLS row alone, and writes partial sums [gate, weight, bias] of its own."""
    pid = tl.program_id(0).to(tl.int64)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    kind = grad_branch.dtype.element_ty
    keep = tl.full([W], 1.0, ACC)
    if GATED:
        keep = 1 - tl.load(gate + d, mask=inside, other=0.0).to(ACC)
    weight = tl.zeros([W], ACC)
    if NORM:
        weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
    gate_sum, weight_sum, bias_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    first = tl.where(part == 0, 0, 1 + (part - 1) * R)
    end = tl.where(part == 0, 1, tl.minimum(first + R, 1 + N))
    video = tower + b * tower_b
    for r in range(first, end):
        place = tl.load(index + b * index_b + (r - 1) * index_n, mask=r > 0, other=0)
        real = place >= 0
        row, to_weight, to_bias = _row_grad(
            grad, grad_normed, out, mean, rstd, weight, b, r, real, d, inside, grad_b, grad_n, normed_b, normed_n, N, D,
            NORM, GRAD, ACC,
        )  # fmt: skip
        at = b * (1 + N) + r
        if BRANCH:
            tl.store(grad_branch + at * D + d, (keep * row).to(kind), mask=inside)
        if TOTAL:
            tl.store(total + at * D + d, row, mask=inside)
        if GATE:
            used = inside & real
            x = tl.load(branch + b * branch_b + r * branch_n + d, mask=used, other=0.0).to(ACC)
            patch = video + (place % T) * tower_t + (1 + place // T) * tower_p
            m = tl.load(patch + d, mask=used & (r > 0), other=0.0).to(ACC)
            if part == 0:
                m += mean_over_frames(video, tower_t, real_frames(frame_counts, b, T, COUNTED), d, inside, ACC, AT_ONCE)
            gate_sum += row * (m - x)
        weight_sum += to_weight
        bias_sum += to_bias
    to = partials + pid * D + d
    if GATE:
        tl.store(to, gate_sum, mask=inside)
    if NORM:
        tl.store(to + rows_of_partials * D, weight_sum, mask=inside)
        tl.store(to + 2 * rows_of_partials * D, bias_sum, mask=inside)


@triton.jit
def _sum_by_list(
    grad, grad_normed, norm_weight, out, mean, rstd, order, starts, total, partials, grad_b, grad_n, normed_b,
    normed_n, N, D, C, rows_of_partials,
    NORM: tl.constexpr, GRAD: tl.constexpr, TOTAL: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of the row gradients of each list (the rows of a frame, say), in C partial sums a list; with NORM also
    LayerNorm's [weight, bias]. The lists hold positions b·N + n; program (list, c) takes every C-th of them."""
    pid = tl.program_id(0).to(tl.int64)
    key, c = pid // C, pid % C
    d = tl.arange(0, W)
    inside = d < D
    weight = tl.zeros([W], ACC)
    if NORM:
        weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
    row_sum, weight_sum, bias_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    first, end = tl.load(starts + key), tl.load(starts + key + 1)
    for i in range(first + c, end, C):
        position = tl.load(order + i)
        b, r = position // N, 1 + position % N
        row, to_weight, to_bias = _row_grad(
            grad, grad_normed, out, mean, rstd, weight, b, r, r > 0, d, inside, grad_b, grad_n, normed_b, normed_n,
            N, D, NORM, GRAD, ACC,
        )  # fmt: skip
        if TOTAL:
            tl.store(total + (b * (1 + N) + r) * D + d, row, mask=inside)
        row_sum += row
        weight_sum += to_weight
        bias_sum += to_bias
    to = partials + pid * D + d
    tl.store(to, row_sum, mask=inside)
    if NORM:
        tl.store(to + rows_of_partials * D, weight_sum, mask=inside)
        tl.store(to + 2 * rows_of_partials * D, bias_sum, mask=inside)


@triton.jit
def _spread(
    grad, gate, rows, frame_counts, grad_tower, grad_b, grad_n, N, T, P, D, scale_cls,
    GATED: tl.constexpr, COUNTED: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tower's gradient, each token written once: its row's, CLS's share of the mean, or zero."""
    pid = tl.program_id(0).to(tl.int64)
    token, frame = pid % (1 + P), pid // (1 + P)
    b, t = frame // T, frame % T
    d = tl.arange(0, W)
    inside = d < D
    count = real_frames(frame_counts, b, T, COUNTED)
    n = tl.load(rows + b * (P * T + 1) + (token - 1) * T + t, mask=token > 0, other=-1)
    shared = (token == 0) & (t < count)
    row = tl.where(token == 0, 0, 1 + n)
    value = tl.load(grad + b * grad_b + row * grad_n + d, mask=inside & (shared | (n >= 0)), other=0.0).to(ACC)
    value *= tl.where(token == 0, scale_cls / tl.maximum(count, 1).to(ACC), 1.0)
    if GATED:
        value *= tl.load(gate + d, mask=inside, other=0.0).to(ACC)
    tl.store(grad_tower + pid * D + d, value.to(grad_tower.dtype.element_ty), mask=inside)


def run_forward(
    tower: Tensor, index: Tensor, frame_counts: Tensor | None, branch: Tensor | None = None, gate: Tensor | None = None,
    tables: tuple[Tensor, Tensor, Tensor] | None = None, norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, and with ``norm`` normed, mean, rstd. ``tables`` (cls_token, pos, time) make it embed, ``branch`` merge."""
    batch, tokens = index.shape
    frames, width = tower.shape[1], tower.shape[3]
    tower = adjacent(tower)
    branch = None if branch is None else adjacent(branch)
    gate = None if gate is None else gate.contiguous()
    cls_token, pos, time = (adjacent(t) for t in tables) if tables else (None, None, None)
    weight, bias, eps = (norm[0].contiguous(), norm[1].contiguous(), norm[2]) if norm else (None, None, 0.0)
    out = tower.new_empty(batch, 1 + tokens, width)
    normed = mean = rstd = None
    if norm:
        normed = tower.new_empty(batch, tokens, width)
        mean, rstd = (tower.new_empty(batch, tokens, dtype=wide(tower.dtype)) for _ in range(2))
    launch(
        _forward, batch * (1 + tokens), tower, branch, gate, cls_token, pos, time, weight, bias, index, frame_counts,
        out, normed, mean, rstd, *tower.stride()[:3], *_strides(branch, 2), *_strides(pos, 1), *_strides(time, 1),
        *index.stride(), tokens, frames, width, eps, EMBED=tables is not None, GATED=gate is not None,
        NORM=norm is not None, COUNTED=frame_counts is not None, AT_ONCE=FRAMES_AT_ONCE,
        **row_options(width, tower.dtype),
    )  # fmt: skip
    return tuple(each for each in (out, normed, mean, rstd) if each is not None)


class RowGrads:
    """The gradients that reach the rows, in a form the kernels take: the rows' own and their LayerNorm's."""

    def __init__(self, grad, grad_normed=None, norm_weight=None, saved=(None, None, None)):
        self.norm = grad_normed is not None
        self.own = None if grad is None else adjacent(grad)
        self.normed = adjacent(grad_normed) if self.norm else None
        self.weight = norm_weight.contiguous() if self.norm else None
        self.out, self.mean, self.rstd = saved if self.norm else (None, None, None)
        like = self.own if self.own is not None else self.normed
        self.dtype, self.device, self.width = like.dtype, like.device, like.shape[-1]

    def strides(self) -> list[int]:
        return [*_strides(self.own, 2), *_strides(self.normed, 2)]

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*size, dtype=dtype or self.dtype, device=self.device)


def merge_backward(grads: RowGrads, tower, branch, gate, index, frame_counts, needs) -> tuple:
    """Gradients of tower, branch and gate, which ``needs`` has a bool for, and of a norm's weight and bias."""
    batch, tokens = index.shape
    frames, patches = tower.shape[1], tower.shape[2] - 1
    tower, branch = adjacent(tower), adjacent(branch)
    gate = None if gate is None else gate.contiguous()
    total = None
    if needs[0]:
        total = grads.empty(batch, 1 + tokens, grads.width, dtype=wide(grads.dtype)) if grads.norm else grads.own
    grad_branch = grads.empty(batch, 1 + tokens, grads.width) if needs[1] else None
    # Rows of a program: many, so that partial sums are few, but not so many that processors idle.
    rows = min(64, max(16 if grads.norm else 8, triton.next_power_of_2(batch * tokens // 1024)))
    parts = 1 + triton.cdiv(tokens, rows)
    sums = grads.empty(3 if grads.norm else int(needs[2]), batch * parts, grads.width, dtype=wide(grads.dtype))
    write_total = grads.norm and needs[0]
    if needs[1] or needs[2] or grads.norm:
        launch(
            _merge_backward, batch * parts, grads.own, grads.normed, tower, branch, gate, grads.weight, index,
            frame_counts, grads.out, grads.mean, grads.rstd, branch if grad_branch is None else grad_branch,
            total if write_total else None, sums, *grads.strides(), *tower.stride()[:3], *branch.stride()[:2],
            *index.stride(), tokens, frames, grads.width, rows, parts, batch * parts, GATED=gate is not None,
            NORM=grads.norm, GRAD=grads.own is not None, BRANCH=needs[1], GATE=needs[2], TOTAL=write_total,
            COUNTED=frame_counts is not None, AT_ONCE=FRAMES_AT_ONCE, **row_options(grads.width, grads.dtype),
        )  # fmt: skip
    grad_gate, *norm_grads = [each.sum(0).to(grads.dtype) for each in sums] or [None]
    grad_tower = None
    if needs[0]:
        grad_tower = spread(total, gate, index, frame_counts, frames, patches, grads.dtype, 1.0)
    return grad_tower, grad_branch, grad_gate if needs[2] else None, *norm_grads


def sum_by_list(grads: RowGrads, keys: Tensor, count: int, total: Tensor | None = None) -> tuple[Tensor, ...]:
    """Row gradients summed over the rows of each key, ``[count, D]``; LayerNorm's weight's and bias's, ``[D]``.

    ``keys`` [B, N] in [0, count), or ``count`` for rows in no list.
    """
    batch, tokens = keys.shape
    order, starts = lists_by_key(keys, count)
    each = triton.cdiv(batch * tokens, max(count, 1))  # rows of a list, on average
    parts = max(1, min(64, triton.cdiv(each, 64)))  # partial sums cost memory traffic
    sums = grads.empty(3 if grads.norm else 1, count * parts, grads.width, dtype=wide(grads.dtype))
    launch(
        _sum_by_list, count * parts, grads.own, grads.normed, grads.weight, grads.out, grads.mean, grads.rstd, order,
        starts, total, sums, *grads.strides(), tokens, grads.width, parts, count * parts, NORM=grads.norm,
        GRAD=grads.own is not None, TOTAL=total is not None, **row_options(grads.width, grads.dtype),
    )  # fmt: skip
    return sums[0].view(count, parts, grads.width).sum(1), *sums[1:].sum(1)


def spread(grad, gate, index, frame_counts, frames, patches, dtype, cls_scale) -> Tensor:
    """Gradient of the tower's tokens ``[B, T, 1+P, D]`` from the rows' ``[B, 1+N, D]``."""
    batch, tokens = index.shape
    grad = adjacent(grad)
    grad_tower = grad.new_empty(batch, frames, 1 + patches, grad.shape[-1], dtype=dtype)
    launch(
        _spread, batch * frames * (1 + patches), grad, gate, rows_by_place(index, patches * frames), frame_counts,
        grad_tower, *grad.stride()[:2], tokens, frames, patches, grad.shape[-1], cls_scale, GATED=gate is not None,
        COUNTED=frame_counts is not None, **row_options(grad.shape[-1], grad.dtype),
    )  # fmt: skip
    return grad_tower


def _strides(tensor: Tensor | None, count: int) -> list[int]:
    return [0] * count if tensor is None else list(tensor.stride()[:count])
