"""Triton kernels of temporal_attention for tiles whose scores do not fit in registers: they take all keys of a tile and
J queries at a time. The tile has all keys of a query, so one product gives its softmax. Legend: ``triton.py``."""

import triton
import triton.language as tl

from bt_kernels._triton_heads import LOG2_E, product, read, write
from bt_kernels.ops.temporal_attention.triton_tile import tile_rows


@triton.jit
def _probabilities(k0, k1, q0, q1, of_key, of_query, scale, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute softmax(k·qᵀ·scale) over the keys of each query's sequence: [R keys, J queries] in float32."""
    scores = product(k0, k1, q0, q1, SPLIT, PRECISION)
    same = of_key[:, None] == of_query[None, :]
    scores = tl.where(same, scores * (scale * LOG2_E), float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 0)[None, :])
    return scores / tl.sum(scores, 0)[None, :]


@triton.jit
def forward(
    qkv, out, index, stride_b, stride_n, stride_c, stride_h, index_b, index_n, N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute softmax(q·kᵀ/√E)·v inside each sequence. One program per (tile, head), head fastest."""
    SPLIT: tl.constexpr = E > E0
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    index += b * index_b
    n, of_key, owned, _ = tile_rows(index, index_n, n0, tl.arange(0, R), N, S, U, RAGGED)
    k0, k1 = read(base + part + n * step, owned, E, E0, E1)
    v0, v1 = read(base + 2 * part + n * step, owned, E, E0, E1)
    for j0 in range(0, R if RAGGED else U, J):
        m, of_query, query_owned, empty = tile_rows(index, index_n, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
        q0, q1 = read(base + m * step, query_owned, E, E0, E1)
        p = tl.trans(_probabilities(k0, k1, q0, q1, of_key, of_query, scale, SPLIT, PRECISION).to(v0.dtype))
        o0 = tl.dot(p, v0, input_precision=PRECISION)
        o1 = o0
        if SPLIT:
            o1 = tl.dot(p, v1, input_precision=PRECISION)
        write(out + ((b * N + m) * H + h) * E, query_owned | empty, o0, o1, E, E0, E1)


@triton.jit
def backward(
    grad, qkv, grad_qkv, index, stride_b, stride_n, stride_c, stride_h, grad_b, grad_n, grad_h, index_b, index_n,
    N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, J: tl.constexpr, TWICE: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - rowsum(P∘dP))/√E, dQ = dS·K, dK = dSᵀ·Q in each sequence.

    With TWICE a separate pass computes dV, where registers cannot hold the sums of dV and dK together.
    """
    SPLIT: tl.constexpr = E > E0
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    grad_step, D = tl.cast(grad_n, tl.int64) * UNIT, tl.cast(H, tl.int64) * E
    base, grad_base = qkv + (b * stride_b + h * stride_h) * UNIT, grad + (b * grad_b + h * grad_h) * UNIT
    to = grad_qkv + (b * N * 3 * H + h) * E
    index += b * index_b
    n, of_key, owned, padding = tile_rows(index, index_n, n0, tl.arange(0, R), N, S, U, RAGGED)
    k0, k1 = read(base + part + n * step, owned, E, E0, E1)
    v0, v1 = read(base + 2 * part + n * step, owned, E, E0, E1)
    dv0, dv1 = tl.zeros([R, E0], tl.float32), tl.zeros([R, E1], tl.float32)
    if TWICE:
        for j0 in range(0, R if RAGGED else U, J):
            m, of_query, query_owned, _ = tile_rows(index, index_n, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
            q0, q1 = read(base + m * step, query_owned, E, E0, E1)
            g0, g1 = read(grad_base + m * grad_step, query_owned, E, E0, E1)
            p = _probabilities(k0, k1, q0, q1, of_key, of_query, scale, SPLIT, PRECISION).to(q0.dtype)
            dv0 = tl.dot(p, g0, dv0, input_precision=PRECISION)
            if SPLIT:
                dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
        write(to + 2 * D + n * 3 * D, owned | padding, dv0, dv1, E, E0, E1)
    dk0, dk1 = tl.zeros([R, E0], tl.float32), tl.zeros([R, E1], tl.float32)
    for j0 in range(0, R if RAGGED else U, J):
        m, of_query, query_owned, empty = tile_rows(index, index_n, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
        q0, q1 = read(base + m * step, query_owned, E, E0, E1)
        g0, g1 = read(grad_base + m * grad_step, query_owned, E, E0, E1)
        p = _probabilities(k0, k1, q0, q1, of_key, of_query, scale, SPLIT, PRECISION)
        dp = product(v0, v1, g0, g1, SPLIT, PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :]) * scale).to(q0.dtype)
        if not TWICE:
            p = p.to(q0.dtype)
            dv0 = tl.dot(p, g0, dv0, input_precision=PRECISION)
            if SPLIT:
                dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        dq0 = tl.dot(tl.trans(ds), k0, input_precision=PRECISION)
        dq1 = dq0
        if SPLIT:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
            dq1 = tl.dot(tl.trans(ds), k1, input_precision=PRECISION)
        write(to + m * 3 * D, query_owned | empty, dq0, dq1, E, E0, E1)
    if not TWICE:
        write(to + 2 * D + n * 3 * D, owned | padding, dv0, dv1, E, E0, E1)
    write(to + D + n * 3 * D, owned | padding, dk0, dk1, E, E0, E1)
