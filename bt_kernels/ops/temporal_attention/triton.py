"""temporal_attention in Triton: many short sequences packed into one tile under a block-diagonal mask.

A program takes R neighbouring rows of one head: whole sequences, whose softmax rows are then complete in the tile, so
the backward needs nothing but q, k, v and the gradient. Rows that the tile holds but does not own are never read.

Legend: B videos, N rows of a video, S steps of a sequence (T frames when ragged), H heads, E head width, R rows of a
tile, U rows by which tiles advance.
"""

import torch
import triton
import triton.language as tl

from bt_kernels._triton import launch

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(index, index_stride, n0, N, S, U, R: tl.constexpr, RAGGED: tl.constexpr):
    """Rows of the tile that starts at row n0: (row, sequence, owned, padding), each [R].

    Grid: tiles hold whole sequences, and U is a multiple of S. Ragged: a sequence belongs to the tile in whose first U
    rows it starts; it ends within the R = U + T - 1 rows or later ones' place, as sequences have at most T rows.
    Rows that are not owned get sequence -1: together they attend to zeros, and their results are not stored.
    """
    r = tl.arange(0, R)
    n = n0 + r
    if RAGGED:
        place = tl.load(index + n * index_stride, mask=n < N, other=-1)
        real = place >= 0
        sequence = place // S
        before = tl.load(index + (n0 - 1) * index_stride, mask=n0 > 0, other=-1) // S
        last = tl.load(index + (n0 + U - 1) * index_stride, mask=n0 + U <= N, other=-1) // S
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
    """softmax(q·kᵀ·scale) inside each sequence, [R, R] in float32."""
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if SPLIT:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    same = sequence[:, None] == sequence[None, :]
    scores = tl.where(same, scores * (scale * _LOG2_E), float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit
def _forward(
    qkv, out, index, stride_b, stride_n, stride_c, stride_h, index_b, index_n, N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out = softmax(q·kᵀ/√E)·v inside each sequence. One program a (tile, head), head fastest."""
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    n, sequence, owned, padding = _tile(index + b * index_b, index_n, n0, N, S, U, R, RAGGED)
    e0, e1 = tl.arange(0, E0), E0 + tl.arange(0, E1)
    row = qkv + (b * stride_b + h * stride_h + n[:, None] * stride_n) * UNIT
    stride_c *= UNIT
    read0, read1 = owned[:, None] & (e0 < E)[None, :], owned[:, None] & (e1 < E)[None, :]
    q0 = tl.load(row + e0, mask=read0, other=0.0)
    k0 = tl.load(row + stride_c + e0, mask=read0, other=0.0)
    v0 = tl.load(row + 2 * stride_c + e0, mask=read0, other=0.0)
    q1, k1, v1 = q0, k0, v0
    SPLIT: tl.constexpr = E > E0
    if SPLIT:
        q1 = tl.load(row + e1, mask=read1, other=0.0)
        k1 = tl.load(row + stride_c + e1, mask=read1, other=0.0)
        v1 = tl.load(row + 2 * stride_c + e1, mask=read1, other=0.0)
    p = _probabilities(q0, k0, q1, k1, sequence, scale, SPLIT, PRECISION).to(v0.dtype)
    to = out + ((b * N + n) * H + h)[:, None] * E
    written = (owned | padding)[:, None]
    o = tl.dot(p, v0, input_precision=PRECISION)
    tl.store(to + e0, o.to(out.dtype.element_ty), mask=written & (e0 < E)[None, :])
    if SPLIT:
        o = tl.dot(p, v1, input_precision=PRECISION)
        tl.store(to + e1, o.to(out.dtype.element_ty), mask=written & (e1 < E)[None, :])


@triton.jit
def _backward(
    grad, qkv, grad_qkv, index, stride_b, stride_n, stride_c, stride_h, grad_b, grad_n, grad_h, index_b, index_n,
    N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - rowsum(P∘dP))/√E, dQ = dS·K, dK = dSᵀ·Q, inside each sequence."""
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    n, sequence, owned, padding = _tile(index + b * index_b, index_n, n0, N, S, U, R, RAGGED)
    e0, e1 = tl.arange(0, E0), E0 + tl.arange(0, E1)
    row = qkv + (b * stride_b + h * stride_h + n[:, None] * stride_n) * UNIT
    stride_c *= UNIT
    grad_row = grad + (b * grad_b + h * grad_h + n[:, None] * grad_n) * UNIT
    read0, read1 = owned[:, None] & (e0 < E)[None, :], owned[:, None] & (e1 < E)[None, :]
    q0 = tl.load(row + e0, mask=read0, other=0.0)
    k0 = tl.load(row + stride_c + e0, mask=read0, other=0.0)
    v0 = tl.load(row + 2 * stride_c + e0, mask=read0, other=0.0)
    g0 = tl.load(grad_row + e0, mask=read0, other=0.0)
    q1, k1, v1, g1 = q0, k0, v0, g0
    SPLIT: tl.constexpr = E > E0
    if SPLIT:
        q1 = tl.load(row + e1, mask=read1, other=0.0)
        k1 = tl.load(row + stride_c + e1, mask=read1, other=0.0)
        v1 = tl.load(row + 2 * stride_c + e1, mask=read1, other=0.0)
        g1 = tl.load(grad_row + e1, mask=read1, other=0.0)
    p = _probabilities(q0, k0, q1, k1, sequence, scale, SPLIT, PRECISION)
    kind = q0.dtype
    to = grad_qkv + ((b * N + n) * 3 * H + h)[:, None] * E
    step = H.to(tl.int64) * E
    write0, write1 = (owned | padding)[:, None] & (e0 < E)[None, :], (owned | padding)[:, None] & (e1 < E)[None, :]
    across = tl.trans(p.to(kind))
    tl.store(to + 2 * step + e0, tl.dot(across, g0, input_precision=PRECISION).to(kind), mask=write0)
    dp = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
    if SPLIT:
        tl.store(to + 2 * step + e1, tl.dot(across, g1, input_precision=PRECISION).to(kind), mask=write1)
        dp = tl.dot(g1, tl.trans(v1), dp, input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(kind)
    across = tl.trans(ds)
    tl.store(to + e0, tl.dot(ds, k0, input_precision=PRECISION).to(kind), mask=write0)
    tl.store(to + step + e0, tl.dot(across, q0, input_precision=PRECISION).to(kind), mask=write0)
    if SPLIT:
        tl.store(to + e1, tl.dot(ds, k1, input_precision=PRECISION).to(kind), mask=write1)
        tl.store(to + step + e1, tl.dot(across, q1, input_precision=PRECISION).to(kind), mask=write1)


def forward(qkv, index, frame_counts, patches, frames, slots):
    qkv = _adjacent(qkv)
    batch, rows, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, rows, heads, width)
    grid, constants = _plan((qkv,), frames, slots)
    launch(
        _forward, batch * grid["tiles"] * heads, qkv, out, index, *_strides(qkv, constants), *index.stride(), rows,
        grid["S"], grid["U"], grid["tiles"], heads, width**-0.5, **constants,
    )  # fmt: skip
    return out


def backward(grad, qkv, index, frame_counts, patches, frames, slots, needs):
    qkv, grad = _adjacent(qkv), _adjacent(grad)
    batch, rows, _, heads, width = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    grid, constants = _plan((qkv, grad), frames, slots)
    launch(
        _backward, batch * grid["tiles"] * heads, grad, qkv, grad_qkv, index,
        *_strides(qkv, constants), *_strides(grad, constants), *index.stride(), rows,
        grid["S"], grid["U"], grid["tiles"], heads, width**-0.5, **constants,
    )  # fmt: skip
    return (grad_qkv,)


def _plan(tensors, frames, slots) -> tuple[dict, dict]:
    """Tiles of a video, and the compile-time constants: a fixed table, found by compiling (bench/resources.py)."""
    qkv = tensors[0]
    rows, width = qkv.shape[1], qkv.shape[4]
    steps = frames if slots is None else slots
    ragged, exact = slots is None, qkv.dtype == torch.float32
    least = 2 * steps if ragged else steps  # ragged tiles overlap by steps - 1 rows
    smallest = 16 if exact and width > 64 else 32
    tile = max(smallest, triton.next_power_of_2(least))  # limits.py says which are taken
    advance = tile - (steps - 1) if ragged else tile // steps * steps
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else 16
    # Strides are passed in units of 8 elements where they can be: Triton sees by itself only multiples of 16, and would
    # read rows of 88 in pieces of 16 bits.
    unit = 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1
    grid = {"S": steps, "U": advance, "tiles": triton.cdiv(rows, advance)}
    constants = dict(
        E=width, E0=first, E1=rest, R=tile, RAGGED=ragged, PRECISION="ieee" if exact else "tf32",
        UNIT=unit,
        warps=(8 if tile == 128 else tile // 16) if not exact else tile // 8, stages=1,
    )  # fmt: skip
    return grid, constants


def _strides(tensor, constants) -> list[int]:
    return [stride // constants["UNIT"] for stride in tensor.stride()[:-1]]


def _adjacent(tensor):
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
