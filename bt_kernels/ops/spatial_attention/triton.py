"""spatial_attention in Triton: each frame's CLS and visible patches, read where they stand (rows S apart).

Row 0 of a frame's sequence is the video's one CLS. Its result in each frame is kept in float32 and averaged after; its
gradients likewise are one float32 partial a frame, summed after: the same sums in the same order every time.

Legend: B videos, S steps (slots, or frames when ragged), L tokens of a frame with CLS, N patch rows of a video, H
heads, E head width (E0 + E1 columns), M rows a program owns, J rows of the other side at a time.
"""

import torch
import triton
import triton.language as tl

from bt_kernels._layout import frame_weights
from bt_kernels._triton import launch

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _length(starts, b, s, S, K, RAGGED: tl.constexpr):
    """Tokens of a frame with CLS, and where its list begins."""
    first = tl.zeros([], tl.int64)
    length = 1 + K
    if RAGGED:
        first = tl.load(starts + b * (S + 1) + s)
        length = 1 + (tl.load(starts + b * (S + 1) + s + 1) - first).to(tl.int32)
    return length, first


@triton.jit
def _rows(order, first, b, s, r, length, S, N, RAGGED: tl.constexpr):
    """Row in [0, N] of the r-th token of a frame, [M]; row 0 is CLS. Only where r < length."""
    if RAGGED:
        listed = (r > 0) & (r < length)
        row = tl.load(order + b * N + first + r - 1, mask=listed, other=-1) + 1
    else:
        row = tl.where(r == 0, 0, 1 + (r - 1).to(tl.int64) * S + s)
    return row


@triton.jit
def _places(index, row, r, length, frames, RAGGED: tl.constexpr):
    """Entry of each token in lse: its place in the grid's frame, or 1 + its patch."""
    if RAGGED:
        place = tl.load(index + row - 1, mask=(r > 0) & (r < length), other=0)
        entry = tl.where(r > 0, 1 + place // frames, 0)
    else:
        entry = r.to(tl.int64)
    return entry


@triton.jit
def _read(at, valid, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Columns [0, E0) and [E0, E) of rows; the second is a copy of the first where there are none."""
    e0, e1 = tl.arange(0, E0), E0 + tl.arange(0, E1)
    x0 = tl.load(at[:, None] + e0, mask=valid[:, None] & (e0 < E)[None, :], other=0.0)
    x1 = x0
    if E > E0:
        x1 = tl.load(at[:, None] + e1, mask=valid[:, None] & (e1 < E)[None, :], other=0.0)
    return x0, x1


@triton.jit
def _write(at, valid, x0, x1, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    e0, e1 = tl.arange(0, E0), E0 + tl.arange(0, E1)
    kind = at.dtype.element_ty
    tl.store(at[:, None] + e0, x0.to(kind), mask=valid[:, None] & (e0 < E)[None, :])
    if E > E0:
        tl.store(at[:, None] + e1, x1.to(kind), mask=valid[:, None] & (e1 < E)[None, :])


@triton.jit
def _product(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a·bᵀ over all columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SPLIT:
        out = tl.dot(a1, tl.trans(b1), out, input_precision=PRECISION)
    return out


@triton.jit
def _forward(
    qkv, index, order, starts, out, lse, cls_out, stride_b, stride_n, stride_c, stride_h, index_b, blocks, H, S, K, N,
    frames, entries, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """softmax(q·kᵀ/√E)·v of M rows of a frame, with a running maximum over J keys at a time."""
    pid = tl.program_id(0).to(tl.int64)
    block, frame_head = pid % blocks, pid // blocks
    h, frame = frame_head % H, frame_head // H
    b, s = frame // S, frame % S
    length, first = _length(starts, b, s, S, K, RAGGED)
    r = (block * M).to(tl.int32) + tl.arange(0, M)
    own = r < length
    row = _rows(order, first, b, s, r, length, S, N, RAGGED)
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    step = stride_n.to(tl.int64) * UNIT
    q0, q1 = _read(base + row * step, own, E, E0, E1)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc0, acc1 = tl.zeros([M, E0], tl.float32), tl.zeros([M, E1], tl.float32)
    keys = base + stride_c * UNIT
    for j0 in range(0, length, J):
        j = j0 + tl.arange(0, J)
        here = j < length
        at = keys + _rows(order, first, b, s, j, length, S, N, RAGGED) * step
        k0, k1 = _read(at, here, E, E0, E1)
        scores = _product(q0, q1, k0, k1, E > E0, PRECISION) * (scale * _LOG2_E)
        scores = tl.where(here[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v0, v1 = _read(at + stride_c * UNIT, here, E, E0, E1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if E > E0:
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        top = higher
    acc0 = acc0 / total[:, None]
    acc1 = acc1 / total[:, None]
    entry = _places(index + b * index_b, row, r, length, frames, RAGGED)
    tl.store(lse + frame_head * entries + entry, (top + tl.log2(total)) * _LN_2, mask=own)
    _write(out + ((b * (1 + N) + row) * H + h) * E, own & (r > 0), acc0, acc1, E, E0, E1)
    _write(cls_out + frame_head * E + row * 0, r == 0, acc0, acc1, E, E0, E1)


@triton.jit
def _gradient_rows(
    grad, out, cls_out, weight, row, r, own, b, h, H, N, frame, frame_head, grad_b, grad_n, grad_h,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dO of rows (CLS: its gradient times the frame's weight) and rowsum(dO·O)."""
    kind = grad.dtype.element_ty
    g0, g1 = _read(grad + (b * grad_b + row * grad_n + h * grad_h) * UNIT, own, E, E0, E1)
    o0, o1 = _read(out + ((b * (1 + N) + row) * H + h) * E, own & (r > 0), E, E0, E1)
    c0, c1 = _read(cls_out + frame_head * E + row * 0, r == 0, E, E0, E1)
    share = tl.where(r == 0, tl.load(weight + frame), 1.0)[:, None]
    f0 = g0.to(tl.float32) * share
    delta = tl.sum(f0 * (o0.to(tl.float32) + c0), 1)
    g0 = f0.to(kind)
    if E > E0:
        f1 = g1.to(tl.float32) * share
        delta += tl.sum(f1 * (o1.to(tl.float32) + c1), 1)
        g1 = f1.to(kind)
    else:
        g1 = g0
    return g0, g1, delta


@triton.jit
def _backward(
    grad, qkv, index, order, starts, out, lse, cls_out, weight, grad_qkv, cls_grad, stride_b, stride_n, stride_c,
    stride_h, grad_b, grad_n, grad_h, index_b, blocks, H, S, K, N, frames, entries, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """P = exp(S - lse), dV = Pᵀ·dO, dS = P∘(dO·Vᵀ - rowsum(dO·O))/√E, dK = dSᵀ·Q; dQ = dS·K.

    Even programs own M keys and pass over the queries, odd ones own M queries and pass over the keys: neighbours, so
    that what both read comes from the cache."""
    pid = tl.program_id(0).to(tl.int64)
    own_keys, pair = pid % 2 == 0, pid // 2
    block, frame_head = pair % blocks, pair // blocks
    h, frame = frame_head % H, frame_head // H
    b, s = frame // S, frame % S
    length, first = _length(starts, b, s, S, K, RAGGED)
    r = (block * M).to(tl.int32) + tl.arange(0, M)
    own = r < length
    row = _rows(order, first, b, s, r, length, S, N, RAGGED)
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    step, part = stride_n.to(tl.int64) * UNIT, stride_c.to(tl.int64) * UNIT
    sums = lse + frame_head * entries
    places = index + b * index_b
    end = tl.where((block * M).to(tl.int32) < length, length, 0)
    to = grad_qkv + ((b * (1 + N) + row) * 3 * H + h) * E
    to_cls = cls_grad + (frame * 3 * H + h) * E + row * 0
    across = H.to(tl.int64) * E
    a0, a1 = tl.zeros([M, E0], tl.float32), tl.zeros([M, E1], tl.float32)
    if own_keys:
        k0, k1 = _read(base + row * step + part, own, E, E0, E1)
        v0, v1 = _read(base + row * step + 2 * part, own, E, E0, E1)
        b0, b1 = tl.zeros([M, E0], tl.float32), tl.zeros([M, E1], tl.float32)
        for j0 in range(0, end, J):
            j = j0 + tl.arange(0, J)
            here = j < length
            query = _rows(order, first, b, s, j, length, S, N, RAGGED)
            q0, q1 = _read(base + query * step, here, E, E0, E1)
            g0, g1, delta = _gradient_rows(
                grad, out, cls_out, weight, query, j, here, b, h, H, N, frame, frame_head, grad_b, grad_n, grad_h,
                E, E0, E1, UNIT,
            )  # fmt: skip
            entry = _places(places, query, j, length, frames, RAGGED)
            logs = tl.load(sums + entry, mask=here, other=0.0) * _LOG2_E
            scores = _product(k0, k1, q0, q1, E > E0, PRECISION) * (scale * _LOG2_E)  # [M keys, J queries]
            p = tl.exp2(tl.where(own[:, None] & here[None, :], scores - logs[None, :], float("-inf")))
            dp = _product(v0, v1, g0, g1, E > E0, PRECISION)
            ds = (p * (dp - delta[None, :]) * scale).to(q0.dtype)
            p = p.to(q0.dtype)
            a0 = tl.dot(ds, q0, a0, input_precision=PRECISION)
            b0 = tl.dot(p, g0, b0, input_precision=PRECISION)
            if E > E0:
                a1 = tl.dot(ds, q1, a1, input_precision=PRECISION)
                b1 = tl.dot(p, g1, b1, input_precision=PRECISION)
        _write(to + across, own & (r > 0), a0, a1, E, E0, E1)
        _write(to + 2 * across, own & (r > 0), b0, b1, E, E0, E1)
        _write(to_cls + across, r == 0, a0, a1, E, E0, E1)
        _write(to_cls + 2 * across, r == 0, b0, b1, E, E0, E1)
    else:
        q0, q1 = _read(base + row * step, own, E, E0, E1)
        g0, g1, delta = _gradient_rows(
            grad, out, cls_out, weight, row, r, own, b, h, H, N, frame, frame_head, grad_b, grad_n, grad_h,
            E, E0, E1, UNIT,
        )  # fmt: skip
        entry = _places(places, row, r, length, frames, RAGGED)
        logs = tl.load(sums + entry, mask=own, other=0.0) * _LOG2_E
        for j0 in range(0, end, J):
            j = j0 + tl.arange(0, J)
            here = j < length
            at = base + _rows(order, first, b, s, j, length, S, N, RAGGED) * step + part
            k0, k1 = _read(at, here, E, E0, E1)
            v0, v1 = _read(at + part, here, E, E0, E1)
            scores = _product(q0, q1, k0, k1, E > E0, PRECISION) * (scale * _LOG2_E)
            p = tl.exp2(tl.where(own[:, None] & here[None, :], scores - logs[:, None], float("-inf")))
            dp = _product(g0, g1, v0, v1, E > E0, PRECISION)
            ds = (p * (dp - delta[:, None]) * scale).to(q0.dtype)
            a0 = tl.dot(ds, k0, a0, input_precision=PRECISION)
            if E > E0:
                a1 = tl.dot(ds, k1, a1, input_precision=PRECISION)
        _write(to, own & (r > 0), a0, a1, E, E0, E1)
        _write(to_cls, r == 0, a0, a1, E, E0, E1)


def forward(qkv, frame_weight, index, frame_counts, patches, frames, slots):
    qkv, index = _adjacent(qkv), index.contiguous()
    batch, rows, _, heads, width = qkv.shape
    steps, groups = _grid(rows, patches, frames, slots)
    empty = qkv.new_zeros if slots is None else qkv.new_empty  # rows that no list names are zeros
    out = empty(batch, rows, heads, width)
    lse = empty(batch, steps, heads, 1 + groups, dtype=torch.float32)
    cls_out = qkv.new_empty(batch, steps, heads, width, dtype=torch.float32)
    order, starts = frame_lists(index, frames) if slots is None else (None, None)
    options = _options((qkv,), slots, backward=False)
    blocks = triton.cdiv(1 + groups, options["M"])
    launch(
        _forward, batch * steps * heads * blocks, qkv, index, order, starts, out, lse, cls_out,
        *_strides(qkv, options), index.stride(0), blocks, heads, steps, groups, rows - 1, frames, 1 + groups,
        width**-0.5, **options,
    )  # fmt: skip
    weight = _weights(frame_weight, frame_counts, cls_out)
    out[:, 0] = torch.einsum("bs,bshe->bhe", weight, cls_out).to(out.dtype)
    return out, lse, cls_out


def backward(grad, qkv, frame_weight, index, frame_counts, patches, frames, slots, out, lse, cls_out, needs):
    qkv, grad, index = _adjacent(qkv), _adjacent(grad), index.contiguous()
    batch, rows, _, heads, width = qkv.shape
    steps, groups = _grid(rows, patches, frames, slots)
    grad_qkv = (qkv.new_zeros if slots is None else qkv.new_empty)(qkv.shape)
    cls_grad = qkv.new_empty(batch, steps, 3, heads, width, dtype=torch.float32)
    order, starts = frame_lists(index, frames) if slots is None else (None, None)
    options = _options((qkv, grad), slots, backward=True)
    blocks = triton.cdiv(1 + groups, options["M"])
    weight = _weights(frame_weight, frame_counts, cls_out).contiguous()
    launch(
        _backward, 2 * batch * steps * heads * blocks, grad, qkv, index, order, starts, out.contiguous(),
        lse.contiguous(), cls_out.contiguous(), weight, grad_qkv, cls_grad, *_strides(qkv, options),
        *_strides(grad, options), index.stride(0), blocks, heads, steps, groups, rows - 1, frames, 1 + groups,
        width**-0.5, **options,
    )  # fmt: skip
    grad_qkv[:, 0] = cls_grad.sum(1).to(grad_qkv.dtype)
    return (grad_qkv,)


def frame_lists(index: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each video sorted by frame, ``[B, N]``, and where each frame's begin, ``[B, T + 1]``; padding is last."""
    frame, order = torch.where(index < 0, frames, index % frames).sort(dim=1, stable=True)
    bounds = torch.arange(frames + 1, device=index.device).expand(len(index), -1).contiguous()
    return order, torch.searchsorted(frame, bounds)


def _tiles(qkv, ragged: bool, backward: bool) -> tuple[int, int, int]:
    """(M, J, warps), found by compiling (bench/resources.py): the largest without spills on any target."""
    split = qkv.shape[4] > 64
    if qkv.dtype == torch.float32:
        return (16, 32, 4) if backward and split else (32, 32, 8 if backward or split else 4)
    if backward and ragged and not split:
        return 32, 32, 4
    return (64, 32, 8 if split else 4) if backward else (64, 64, 4)


def _options(tensors, slots, backward: bool) -> dict:
    width = tensors[0].shape[4]
    own, other, warps = _tiles(tensors[0], slots is None, backward)
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else 16
    # Strides are passed in units of 8 elements where they can be: Triton sees by itself only multiples of 16, and would
    # read rows of 88 in pieces of 16 bits.
    unit = 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1
    precision = "ieee" if tensors[0].dtype == torch.float32 else "tf32"
    return dict(
        E=width, E0=first, E1=rest, M=own, J=other, RAGGED=slots is None, PRECISION=precision, UNIT=unit, warps=warps,
        stages=2,
    )  # fmt: skip


def _grid(rows: int, patches: int, frames: int, slots: int | None) -> tuple[int, int]:
    """Steps, and the most patch tokens of one."""
    return (frames, patches) if slots is None else (slots, (rows - 1) // slots)


def _weights(frame_weight, frame_counts, cls_out):
    if frame_weight is not None:
        return frame_weight.to(cls_out.dtype)
    return frame_weights(frame_counts, *cls_out.shape[:2], cls_out)


def _strides(tensor, options) -> list[int]:
    return [stride // options["UNIT"] for stride in tensor.stride()[:-1]]


def _adjacent(tensor):
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
