"""Triton kernels of spatial_attention's backward. ``triton_forward.py`` has the legend.

With w the frame's weight for the CLS query and 1 for all other queries, in each frame:

    P = exp(Q·Kᵀ/√E - lse), dV = (w·P)ᵀ·dO, dS = w·P∘(dO·Vᵀ - δ)/√E, dK = dSᵀ·Q, dQ = dS·K, δ = Σ P∘(dO·Vᵀ) = Σ dO∘O
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
    zeros,
)
from bt_kernels.ops.spatial_attention.triton_forward import frame_length, frame_share, patch_rows, token_rows


@triton.jit(do_not_specialize=HEAD_LENGTHS)
def backward_whole(
    grad, qkv, order, patch, counts, lse, weight, weighted, frame_counts, grad_qkv, cls_grad, stride_b, stride_n,
    stride_c, stride_h, grad_b, grad_n, grad_h, weight_b, weight_s, H, S, K, N, entries, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Process a frame of at most M tokens in one program. The tile holds all keys and takes J queries at a time, so one
    product completes dQ, and δ is computed from P."""
    pid = tl.program_id(0).to(tl.int64)
    h, frame = pid % H, pid // H
    b, s = frame // S, frame % S
    length = frame_length(counts, frame, K, RAGGED)
    m = tl.arange(0, M)
    valid_r = m < length
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    D = tl.cast(H, tl.int64) * E
    to = grad_qkv + (b * (1 + N) * 3 * H + h) * E
    to_cls = cls_grad + (frame * 3 * H + h) * E
    key, _ = token_rows(order, patch, frame, s, m, length, S, K, RAGGED)
    k = read(base + part + key.to(tl.int64) * step, valid_r, E, E0, E1)
    v = read(base + 2 * part + key.to(tl.int64) * step, valid_r, E, E0, E1)
    share = frame_share(weight, weighted, frame_counts, b, s, S, weight_b, weight_s)
    dk, dv = zeros(M, E, E0, E1), zeros(M, E, E0, E1)
    for j0 in range(0, length, J):
        j = j0 + tl.arange(0, J)
        valid_j = j < length
        row, entry = token_rows(order, patch, frame, s, j, length, S, K, RAGGED)
        q = read(base + row.to(tl.int64) * step, valid_j, E, E0, E1)
        g = read(grad + (b * grad_b + h * grad_h + row.to(tl.int64) * grad_n) * UNIT, valid_j, E, E0, E1)
        logs = tl.load(lse + (frame * H + h) * entries + entry, mask=valid_j, other=0.0) * LOG2_E
        scores = product(k, q, PRECISION) * (scale * LOG2_E) - logs[None, :]  # [M keys, J queries]
        p = tl.exp2(tl.where(valid_r[:, None] & valid_j[None, :], scores, float("-inf")))
        dp = product(v, g, PRECISION)
        delta = tl.sum(p * dp, 0)
        p = p * tl.where(j == 0, share, 1.0)[None, :]
        ds = (p * (dp - delta[None, :]) * scale).to(q[0].dtype)
        dv = add_product(dv, p.to(q[0].dtype), g, PRECISION)
        dk = add_product(dk, ds, q, PRECISION)
        dq = add_product(zeros(J, E, E0, E1), tl.trans(ds), k, PRECISION)
        write(to + row.to(tl.int64) * 3 * D, valid_j & (j > 0), dq, E, E0, E1)
        write(to_cls + row * 0, j == 0, dq, E, E0, E1)
    to += key.to(tl.int64) * 3 * D
    write(to + D, valid_r & (m > 0), dk, E, E0, E1)
    write(to + 2 * D, valid_r & (m > 0), dv, E, E0, E1)
    to_cls += key * 0
    write(to_cls + D, m == 0, dk, E, E0, E1)
    write(to_cls + 2 * D, m == 0, dv, E, E0, E1)


@triton.jit
def _key_gradients(
    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step, out_step, D,
    s, frame, length, r, S, K, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of tokens r, [M]: from the CLS query, then from the queries of J patches at a time."""
    valid_r = r < length
    row, _ = token_rows(order, patch, frame, s, r, length, S, K, RAGGED)
    k = read(base + part + row.to(tl.int64) * step, valid_r, E, E0, E1)
    v = read(base + 2 * part + row.to(tl.int64) * step, valid_r, E, E0, E1)
    q_cls, g_cls, o_cls = read_one(base, E, E0, E1), read_one(grad_base, E, E0, E1), read_one(cls_at, E, E0, E1)
    x = product_by_rows(k, q_cls) * (scale * LOG2_E) - tl.load(sums) * LOG2_E
    w = tl.exp2(tl.where(valid_r, x, float("-inf"))) * share
    dv = scaled(g_cls, w)
    w *= (product_by_rows(v, g_cls) - product_by_rows(g_cls, o_cls)) * scale
    dk = scaled(q_cls, w)
    for j0 in range(0, length - 1, J):
        j = j0 + tl.arange(0, J)
        valid_j = j < length - 1
        query, entry = patch_rows(order, patch, frame, s, j, valid_j, S, K, RAGGED)
        q = read(base + query.to(tl.int64) * step, valid_j, E, E0, E1)
        g = read(grad_base + query.to(tl.int64) * grad_step, valid_j, E, E0, E1)
        delta = product_by_rows(g, read(out_base + query.to(tl.int64) * out_step, valid_j, E, E0, E1))
        logs = tl.load(sums + entry, mask=valid_j, other=0.0) * LOG2_E
        scores = product(k, q, PRECISION) * (scale * LOG2_E) - logs[None, :]  # [M keys, J queries]
        p = tl.exp2(tl.where(valid_r[:, None] & valid_j[None, :], scores, float("-inf")))
        dp = product(v, g, PRECISION)
        ds = (p * (dp - delta[None, :]) * scale).to(q[0].dtype)
        dv = add_product(dv, p.to(q[0].dtype), g, PRECISION)
        dk = add_product(dk, ds, q, PRECISION)
    to += row.to(tl.int64) * 3 * D
    write(to + D, valid_r & (r > 0), dk, E, E0, E1)
    write(to + 2 * D, valid_r & (r > 0), dv, E, E0, E1)
    to_cls += row * 0
    write(to_cls + D, r == 0, dk, E, E0, E1)
    write(to_cls + 2 * D, r == 0, dv, E, E0, E1)


@triton.jit
def _query_gradients(
    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step, out_step, D,
    s, frame, length, r, S, K, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ of tokens r, [M]: from the CLS key, then from the keys of J patches at a time."""
    valid_r = r < length
    row, entry = token_rows(order, patch, frame, s, r, length, S, K, RAGGED)
    q = read(base + row.to(tl.int64) * step, valid_r, E, E0, E1)
    g = read(grad_base + row.to(tl.int64) * grad_step, valid_r, E, E0, E1)
    delta = product_by_rows(g, read(out_base + row.to(tl.int64) * out_step, valid_r & (r > 0), E, E0, E1))
    delta = tl.where(r == 0, product_by_rows(g, read_one(cls_at, E, E0, E1)), delta)
    weights = tl.where(r == 0, share, 1.0) * scale
    logs = tl.load(sums + entry, mask=valid_r, other=0.0) * LOG2_E
    k_cls = read_one(base + part, E, E0, E1)
    w = tl.exp2(tl.where(valid_r, product_by_rows(q, k_cls) * (scale * LOG2_E) - logs, float("-inf")))
    w *= (product_by_rows(g, read_one(base + 2 * part, E, E0, E1)) - delta) * weights
    dq = scaled(k_cls, w)
    for j0 in range(0, length - 1, J):
        j = j0 + tl.arange(0, J)
        valid_j = j < length - 1
        key, _ = patch_rows(order, patch, frame, s, j, valid_j, S, K, RAGGED)
        k = read(base + part + key.to(tl.int64) * step, valid_j, E, E0, E1)
        v = read(base + 2 * part + key.to(tl.int64) * step, valid_j, E, E0, E1)
        scores = product(q, k, PRECISION) * (scale * LOG2_E) - logs[:, None]
        p = tl.exp2(tl.where(valid_r[:, None] & valid_j[None, :], scores, float("-inf")))
        dp = product(g, v, PRECISION)
        ds = (p * (dp - delta[:, None]) * weights[:, None]).to(q[0].dtype)
        dq = add_product(dq, ds, k, PRECISION)
    write(to + row.to(tl.int64) * 3 * D, valid_r & (r > 0), dq, E, E0, E1)
    write(to_cls + row * 0, r == 0, dq, E, E0, E1)


@triton.jit(do_not_specialize=HEAD_LENGTHS)
def backward_blocks(
    grad, qkv, order, patch, counts, out, lse, cls_out, weight, weighted, frame_counts, grad_qkv, cls_grad, stride_b,
    stride_n, stride_c, stride_h, grad_b, grad_n, grad_h, weight_b, weight_s, blocks, H, S, K, N, entries, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr, J: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Process frames of any length: even programs take M keys and loop over the queries, odd ones take M queries and
    loop over the keys. The two programs of a pair are adjacent, so they share cached reads."""
    pid = tl.program_id(0).to(tl.int64)
    for_keys, pair = pid % 2 == 0, pid // 2
    block, frame_head = pair % blocks, pair // blocks
    h, frame = frame_head % H, frame_head // H
    b, s = frame // S, frame % S
    length = frame_length(counts, frame, K, RAGGED)
    r0 = (block * M).to(tl.int32)
    if length > r0:
        base = qkv + (b * stride_b + h * stride_h) * UNIT
        step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
        grad_base, grad_step = grad + (b * grad_b + h * grad_h) * UNIT, tl.cast(grad_n, tl.int64) * UNIT
        D = tl.cast(H, tl.int64) * E
        out_base = out + (b * (1 + N) * H + h) * E
        sums = lse + frame_head * entries
        cls_at = cls_out + frame_head * E
        to = grad_qkv + (b * (1 + N) * 3 * H + h) * E
        to_cls = cls_grad + (frame * 3 * H + h) * E
        share = frame_share(weight, weighted, frame_counts, b, s, S, weight_b, weight_s)
        if for_keys:
            if length - r0 > TAIL:
                _key_gradients(
                    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step,
                    D, D, s, frame, length, r0 + tl.arange(0, M), S, K, scale, E, E0, E1, M, J, RAGGED,
                    PRECISION,
                )  # fmt: skip
            elif TAIL > 0:
                _key_gradients(
                    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step,
                    D, D, s, frame, length, r0 + tl.arange(0, TAIL), S, K, scale, E, E0, E1, TAIL, J, RAGGED,
                    PRECISION,
                )  # fmt: skip
        else:
            if length - r0 > TAIL:
                _query_gradients(
                    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step,
                    D, D, s, frame, length, r0 + tl.arange(0, M), S, K, scale, E, E0, E1, M, J, RAGGED,
                    PRECISION,
                )  # fmt: skip
            elif TAIL > 0:
                _query_gradients(
                    base, grad_base, out_base, order, patch, sums, cls_at, share, to, to_cls, step, part, grad_step,
                    D, D, s, frame, length, r0 + tl.arange(0, TAIL), S, K, scale, E, E0, E1, TAIL, J, RAGGED,
                    PRECISION,
                )  # fmt: skip
