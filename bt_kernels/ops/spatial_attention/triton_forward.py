"""Triton kernels of spatial_attention's forward, and helpers of both passes.

Legend: B videos, S steps (slots, or frames when ragged), L tokens of a frame with CLS, K largest number of patches,
N patch rows of a video, H heads, E head width, D = H·E, M rows of a program, J patches at a time.
Token 0 of a frame is the video's only CLS, token r > 0 its r-th patch. Strides are in units of UNIT elements.
"""

import triton
import triton.language as tl

from bt_kernels._triton_heads import (
    HEAD_LENGTHS,
    LOG2_E,
    add_product,
    product,
    product_by_rows,
    read,
    read_one,
    scaled,
    write,
)
from bt_kernels._triton_rows import LENGTHS, real_frames

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=LENGTHS)
def clear_padding(index, out, index_b, N, W, R: tl.constexpr, C: tl.constexpr):
    """Set the rows of ``out`` [B, 1+N, W] whose index is -1 to zero; other rows are neither read nor written."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, R)
    b = pid // blocks
    n = (pid % blocks) * R + tl.arange(0, R)
    empty = tl.load(index + b * index_b + n, mask=n < N, other=0) < 0
    if tl.sum(empty.to(tl.int32), 0) > 0:
        to = out + (b * (1 + N) + 1 + n[:, None]) * W
        for c0 in range(0, W, C):
            c = c0 + tl.arange(0, C)[None, :]
            tl.store(to + c, tl.zeros([R, C], out.dtype.element_ty), mask=empty[:, None] & (c < W))


@triton.jit
def frame_share(weight, weighted, frame_counts, b, s, S, weight_b, weight_s):
    """Return the weight of a frame in the CLS row: ``weight`` if ``weighted`` (an int, so that both cases are one
    kernel), else that of a mean over the real frames."""
    count = real_frames(frame_counts, b, S)
    share = tl.where(s < count, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)
    given = tl.load(weight + b * weight_b + s * weight_s, mask=weighted > 0, other=0.0).to(tl.float32)
    return tl.where(weighted > 0, given, share)


@triton.jit(do_not_specialize=LENGTHS)
def sum_frames(
    partial, weight, weighted, frame_counts, out, weight_b, weight_s, out_b, S, W, MEAN: tl.constexpr, C: tl.constexpr
):
    """Compute out[b, 0] = Σ_s partial[b, s] of rows of W, in a fixed order; with MEAN, weighted by frame_share."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(W, C)
    b = pid // blocks
    c = (pid % blocks) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for s in range(S):
        x = tl.load(partial + (b * S + s) * W + c, mask=c < W, other=0.0)
        if MEAN:
            x *= frame_share(weight, weighted, frame_counts, b, s, S, weight_b, weight_s)
        total += x
    tl.store(out + b * out_b + c, total.to(out.dtype.element_ty), mask=c < W)


@triton.jit
def frame_length(counts, frame, K, RAGGED: tl.constexpr):
    """Return L, the number of tokens of a frame with CLS."""
    if RAGGED:
        length = 1 + tl.load(counts + frame)
    else:
        length = 1 + K
    return length


@triton.jit
def patch_rows(order, patch, frame, s, j, valid, S, K, RAGGED: tl.constexpr):
    """Return the rows in [1, N] of patches j of a frame and their entries in lse (int32), where ``valid``."""
    if RAGGED:
        row = 1 + tl.load(order + frame * K + j, mask=valid, other=0)
        entry = 1 + tl.load(patch + frame * K + j, mask=valid, other=0)
    else:
        row = (1 + j.to(tl.int64) * S + s).to(tl.int32)
        entry = 1 + j
    return row, entry


@triton.jit
def token_rows(order, patch, frame, s, r, length, S, K, RAGGED: tl.constexpr):
    """Return :func:`patch_rows` of tokens r; CLS has row 0 and entry 0."""
    row, entry = patch_rows(order, patch, frame, s, r - 1, (r > 0) & (r < length), S, K, RAGGED)
    return tl.where(r == 0, 0, row), tl.where(r == 0, 0, entry)


@triton.jit
def _attend(
    base, order, patch, out, lse, cls_out, step, part, b, s, h, frame, length, r, H, S, K, N, entries, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute attention of tokens r, [M], of a frame. The online softmax starts with CLS; the loop is over patches."""
    valid_r = r < length
    row, entry = token_rows(order, patch, frame, s, r, length, S, K, RAGGED)
    q = read(base + row.to(tl.int64) * step, valid_r, E, E0, E1)
    keys = base + part
    top = product_by_rows(q, read_one(keys, E, E0, E1)) * (scale * LOG2_E)
    total = tl.full([M], 1.0, tl.float32)
    acc = scaled(read_one(keys + part, E, E0, E1), total)
    for j0 in range(0, length - 1, J):
        j = j0 + tl.arange(0, J)
        valid_j = j < length - 1
        at, _ = patch_rows(order, patch, frame, s, j, valid_j, S, K, RAGGED)
        at = keys + at.to(tl.int64) * step
        k = read(at, valid_j, E, E0, E1)
        scores = product(q, k, PRECISION) * (scale * LOG2_E)
        scores = tl.where(valid_j[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        v = read(at + part, valid_j, E, E0, E1)
        acc = add_product(scaled(acc, rescale), p.to(v[0].dtype), v, PRECISION)
        top = new_top
    acc = scaled(acc, 1 / total)
    tl.store(lse + (frame * H + h) * entries + entry, (top + tl.log2(total)) * _LN_2, mask=valid_r)
    write(out + ((b * (1 + N) + row.to(tl.int64)) * H + h) * E, valid_r & (r > 0), acc, E, E0, E1)
    write(cls_out + (frame * H + h) * E + row * 0, r == 0, acc, E, E0, E1)


@triton.jit(do_not_specialize=HEAD_LENGTHS)
def forward(
    qkv, order, patch, counts, out, lse, cls_out, stride_b, stride_n, stride_c, stride_h, blocks, H, S, K, N, entries,
    scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr, J: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute softmax(q·kᵀ/√E)·v of M tokens of a frame; a last block of at most TAIL tokens uses a tile of TAIL."""
    pid = tl.program_id(0).to(tl.int64)
    block, frame_head = pid % blocks, pid // blocks
    h, frame = frame_head % H, frame_head // H
    b, s = frame // S, frame % S
    length = frame_length(counts, frame, K, RAGGED)
    r0 = (block * M).to(tl.int32)
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    if length - r0 > TAIL:
        _attend(
            base, order, patch, out, lse, cls_out, step, part, b, s, h, frame, length, r0 + tl.arange(0, M),
            H, S, K, N, entries, scale, E, E0, E1, M, J, RAGGED, PRECISION,
        )  # fmt: skip
    elif TAIL > 0:
        if length > r0:
            _attend(
                base, order, patch, out, lse, cls_out, step, part, b, s, h, frame, length, r0 + tl.arange(0, TAIL),
                H, S, K, N, entries, scale, E, E0, E1, TAIL, J, RAGGED, PRECISION,
            )  # fmt: skip
