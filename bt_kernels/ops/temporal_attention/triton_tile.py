"""Triton kernels of temporal_attention that hold all scores of a tile: short sequences under a block-diagonal mask.
Legend: ``triton.py``."""

import triton
import triton.language as tl

from bt_kernels._triton_heads import LOG2_E, product, read, write


@triton.jit
def tile_rows(index, index_n, n0, r, N, S, U, RAGGED: tl.constexpr):
    """Return (row, sequence, owned, padding) of rows r of the tile that starts at row n0, each as long as r.

    Grid: tiles hold whole sequences, and U is a multiple of S. Ragged: a sequence belongs to the tile in whose first U
    rows it starts; it ends within that tile's R = U + T - 1 rows, because sequences have at most T rows. Rows that are
    not owned get sequence -1: together they attend to zeros, and their results are not stored.
    """
    n = n0 + r
    if RAGGED:
        place = tl.load(index + n * index_n, mask=n < N, other=-1)
        real = place >= 0
        sequence = place // S
        before = tl.load(index + (n0 - 1) * index_n, mask=n0 > 0, other=-1) // S
        last = tl.load(index + (n0 + U - 1) * index_n, mask=n0 + U <= N, other=-1) // S
        begins = (sequence != before) | (n0 == 0)
        owned = real & begins & ((r < U) | (sequence == last))
        padding = (n < N) & (r < U) & (place < 0)
    else:
        sequence = (r // S).to(tl.int64)
        owned = (r < U) & (n < N)
        padding = owned & False
    return n, tl.where(owned, sequence, -1), owned, padding


@triton.jit
def _probabilities(q0, k0, q1, k1, sequence, scale, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute softmax(q·kᵀ·scale) inside each sequence: [R, R] in float32."""
    scores = product(q0, q1, k0, k1, SPLIT, PRECISION)
    same = sequence[:, None] == sequence[None, :]
    scores = tl.where(same, scores * (scale * LOG2_E), float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit
def forward(
    qkv, out, index, stride_b, stride_n, stride_c, stride_h, index_b, index_n, N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute softmax(q·kᵀ/√E)·v inside each sequence. One program per (tile, head), head fastest."""
    SPLIT: tl.constexpr = E > E0
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    n, sequence, owned, padding = tile_rows(index + b * index_b, index_n, n0, tl.arange(0, R), N, S, U, RAGGED)
    row = qkv + (b * stride_b + h * stride_h + n * stride_n) * UNIT
    part = tl.cast(stride_c, tl.int64) * UNIT
    q0, q1 = read(row, owned, E, E0, E1)
    k0, k1 = read(row + part, owned, E, E0, E1)
    v0, v1 = read(row + 2 * part, owned, E, E0, E1)
    p = _probabilities(q0, k0, q1, k1, sequence, scale, SPLIT, PRECISION).to(v0.dtype)
    o0 = tl.dot(p, v0, input_precision=PRECISION)
    o1 = o0
    if SPLIT:
        o1 = tl.dot(p, v1, input_precision=PRECISION)
    write(out + ((b * N + n) * H + h) * E, owned | padding, o0, o1, E, E0, E1)


@triton.jit
def backward(
    grad, qkv, grad_qkv, index, stride_b, stride_n, stride_c, stride_h, grad_b, grad_n, grad_h, index_b, index_n,
    N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - rowsum(P∘dP))/√E, dQ = dS·K, dK = dSᵀ·Q in each sequence."""
    SPLIT: tl.constexpr = E > E0
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    n, sequence, owned, padding = tile_rows(index + b * index_b, index_n, n0, tl.arange(0, R), N, S, U, RAGGED)
    row = qkv + (b * stride_b + h * stride_h + n * stride_n) * UNIT
    part = tl.cast(stride_c, tl.int64) * UNIT
    q0, q1 = read(row, owned, E, E0, E1)
    k0, k1 = read(row + part, owned, E, E0, E1)
    v0, v1 = read(row + 2 * part, owned, E, E0, E1)
    g0, g1 = read(grad + (b * grad_b + h * grad_h + n * grad_n) * UNIT, owned, E, E0, E1)
    p = _probabilities(q0, k0, q1, k1, sequence, scale, SPLIT, PRECISION)
    dtype = q0.dtype
    to = grad_qkv + ((b * N + n) * 3 * H + h) * E
    step = tl.cast(H, tl.int64) * E
    written = owned | padding
    transposed = tl.trans(p.to(dtype))
    x0 = tl.dot(transposed, g0, input_precision=PRECISION)
    x1 = x0
    if SPLIT:
        x1 = tl.dot(transposed, g1, input_precision=PRECISION)
    write(to + 2 * step, written, x0, x1, E, E0, E1)
    dp = product(g0, g1, v0, v1, SPLIT, PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(dtype)
    transposed = tl.trans(ds)
    x0 = tl.dot(ds, k0, input_precision=PRECISION)
    if SPLIT:
        x1 = tl.dot(ds, k1, input_precision=PRECISION)
    write(to, written, x0, x1, E, E0, E1)
    x0 = tl.dot(transposed, q0, input_precision=PRECISION)
    if SPLIT:
        x1 = tl.dot(transposed, q1, input_precision=PRECISION)
    write(to + step, written, x0, x1, E, E0, E1)
