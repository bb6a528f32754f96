"""Triton kernels of temporal_attention. ``triton.py`` has the legend.

A program holds all keys of a tile and takes J queries at a time: all of the tile at once (J = R) where their scores
fit in registers. The tile has all keys of each of its queries, so one product gives a softmax.

Weights between two sequences of a tile are zero, but 0·Inf is NaN: rows that hold NaN or Inf are taken out of the
products of several sequences, and NaN is put into the weights inside their own sequence.
"""

import triton
import triton.language as tl

from bt_kernels._triton_heads import HEAD_LENGTHS, LOG2_E, add_product, product, read, write, zeros


@triton.jit
def _tile_rows(index, n0, r, N, S, U, RAGGED: tl.constexpr):
    """Return (row, sequence, owned, padding) of rows r of the tile that starts at row n0, each as long as r.

    Grid: tiles hold whole sequences, and U is a multiple of S. Ragged: a sequence belongs to the tile in whose first U
    rows it starts; it ends within that tile's R = U + T - 1 rows, because sequences have at most T rows. Rows that are
    not owned get sequence -1: together they attend to zeros, and their results are not stored.
    """
    n = n0 + r
    if RAGGED:
        place = tl.load(index + n, mask=n < N, other=-1).to(tl.int32)
        real = place >= 0
        sequence = place // S
        before = tl.load(index + (n0 - 1), mask=n0 > 0, other=-1).to(tl.int32) // S
        last = tl.load(index + (n0 + U - 1), mask=n0 + U <= N, other=-1).to(tl.int32) // S
        begins = (sequence != before) | (n0 == 0)
        owned = real & begins & ((r < U) | (sequence == last))
        padding = (n < N) & (r < U) & (place < 0)
    else:
        sequence = r // S
        owned = (r < U) & (n < N)
        padding = owned & False
    return n, tl.where(owned, sequence, -1), owned, padding


@triton.jit
def _poison(x):
    """Return a number for each row of x: 0, or NaN if the row holds NaN or Inf."""
    out = tl.sum(x[0].to(tl.float32) * 0.0, 1)
    for i in tl.static_range(1, len(x)):
        out += tl.sum(x[i].to(tl.float32) * 0.0, 1)
    return out


@triton.jit
def _without_poisoned(x, poison):
    """Return x with zeros in the rows whose ``poison`` is NaN."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (tl.where((poison == 0.0)[:, None], x[i], 0.0).to(x[i].dtype),)
    return out


@triton.jit
def _softmax(scores, same, KEYS: tl.constexpr):
    """Compute the softmax of scores in units of log 2 over axis KEYS, among those in the ``same`` sequence."""
    scores = tl.where(same, scores, float("-inf"))
    scores = tl.exp2(scores - tl.expand_dims(tl.max(scores, KEYS), KEYS))
    return scores / tl.expand_dims(tl.sum(scores, KEYS), KEYS)


@triton.jit(do_not_specialize=HEAD_LENGTHS)
def forward(
    qkv, out, index, stride_b, stride_n, stride_c, stride_h, index_b, N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute softmax(q·kᵀ/√E)·v inside each sequence. One program per (tile, head), head fastest. A tile holds one
    sequence or, with SEVERAL, more."""
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    base = qkv + (b * stride_b + h * stride_h) * UNIT
    index += b * index_b
    n, of_key, owned, _ = _tile_rows(index, n0, tl.arange(0, R), N, S, U, RAGGED)
    k = read(base + n * step + part, owned, E, E0, E1)
    v = read(base + n * step + 2 * part, owned, E, E0, E1)
    poison = tl.zeros([R], tl.float32)
    if SEVERAL:
        poison = _poison(v)
        v = _without_poisoned(v, poison)
    for j0 in range(0, R if RAGGED or J == R else U, J):
        m, of_query, query_owned, empty = _tile_rows(index, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
        q = read(base + m * step, query_owned, E, E0, E1)
        if J == R:
            scores = product(q, k, PRECISION) * (scale * LOG2_E) + poison[None, :]
            p = _softmax(scores, of_query[:, None] == of_key[None, :], 1)
        else:  # few queries: the warps divide the keys
            scores = product(k, q, PRECISION) * (scale * LOG2_E) + poison[:, None]
            p = tl.trans(_softmax(scores, of_key[:, None] == of_query[None, :], 0))
        o = add_product(zeros(J, E, E0, E1), p.to(v[0].dtype), v, PRECISION)
        write(out + ((b * N + m) * H + h) * E, query_owned | empty, o, E, E0, E1)


@triton.jit
def _weights(k, q, poison, same, scale, SEVERAL: tl.constexpr, PRECISION: tl.constexpr):
    """Return softmax(k·qᵀ·scale) over the keys, [R keys, J queries]; with SEVERAL, NaN where a sequence has poison."""
    scores = product(k, q, PRECISION) * (scale * LOG2_E)
    if SEVERAL:
        # One NaN makes NaN of a whole softmax, of the zeros between sequences too.
        p = tl.where(same, _softmax(scores + poison, same, 0), 0.0)
    else:
        p = _softmax(scores, same, 0)
    return p


@triton.jit(do_not_specialize=HEAD_LENGTHS)
def backward(
    grad, qkv, grad_qkv, index, stride_b, stride_n, stride_c, stride_h, grad_b, grad_n, grad_h, index_b,
    N, S, U, tiles, H, scale,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr, J: tl.constexpr, TWICE: tl.constexpr,
    RAGGED: tl.constexpr, SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - rowsum(P∘dP))/√E, dQ = dS·K, dK = dSᵀ·Q in each sequence.

    With TWICE a separate pass computes dV, where registers cannot hold the sums of dV and dK together.
    """
    pid = tl.program_id(0).to(tl.int64)
    h, tile = pid % H, pid // H
    b, n0 = tile // tiles, (tile % tiles) * U
    step, part = tl.cast(stride_n, tl.int64) * UNIT, tl.cast(stride_c, tl.int64) * UNIT
    grad_step, D = tl.cast(grad_n, tl.int64) * UNIT, tl.cast(H, tl.int64) * E
    base, grad_base = qkv + (b * stride_b + h * stride_h) * UNIT, grad + (b * grad_b + h * grad_h) * UNIT
    to = grad_qkv + (b * N * 3 * H + h) * E
    index += b * index_b
    n, of_key, owned, padding = _tile_rows(index, n0, tl.arange(0, R), N, S, U, RAGGED)
    k = read(base + n * step + part, owned, E, E0, E1)
    v = read(base + n * step + 2 * part, owned, E, E0, E1)
    dv, dk = zeros(R, E, E0, E1), zeros(R, E, E0, E1)
    if TWICE:
        for j0 in range(0, R if RAGGED or J == R else U, J):
            m, of_query, query_owned, _ = _tile_rows(index, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
            q = read(base + m * step, query_owned, E, E0, E1)
            g = read(grad_base + m * grad_step, query_owned, E, E0, E1)
            of_g = tl.zeros([J], tl.float32)
            if SEVERAL:
                of_g = _poison(g)
                g = _without_poisoned(g, of_g)
            p = _weights(k, q, of_g[None, :], of_key[:, None] == of_query[None, :], scale, SEVERAL, PRECISION)
            dv = add_product(dv, p.to(q[0].dtype), g, PRECISION)
        write(to + 2 * D + n * 3 * D, owned | padding, dv, E, E0, E1)
    of_k, of_q = tl.zeros([R], tl.float32), tl.zeros([J], tl.float32)
    if SEVERAL:
        of_k = _poison(k)
        k = _without_poisoned(k, of_k)
    for j0 in range(0, R if RAGGED or J == R else U, J):
        m, of_query, query_owned, empty = _tile_rows(index, n0, j0 + tl.arange(0, J), N, S, U, RAGGED)
        q = read(base + m * step, query_owned, E, E0, E1)
        g = read(grad_base + m * grad_step, query_owned, E, E0, E1)
        same = of_key[:, None] == of_query[None, :]
        if SEVERAL:
            of_q = _poison(q)
            q = _without_poisoned(q, of_q)
            if not TWICE:
                of_g = _poison(g)
                g = _without_poisoned(g, of_g)
                of_q += of_g
        p = _weights(k, q, of_k[:, None] + of_q[None, :], same, scale, SEVERAL, PRECISION)
        if not TWICE:
            dv = add_product(dv, p.to(q[0].dtype), g, PRECISION)
        dp = product(v, g, PRECISION)
        if SEVERAL:
            dp = tl.where(same, dp, 0.0)
        ds = p * (dp - tl.sum(p * dp, 0)[None, :]) * scale
        if SEVERAL:
            ds = tl.where(same, ds, 0.0)
        ds = ds.to(q[0].dtype)
        dq = add_product(zeros(J, E, E0, E1), tl.trans(ds), k, PRECISION)
        write(to + m * 3 * D, query_owned | empty, dq, E, E0, E1)
        dk = add_product(dk, ds, q, PRECISION)
    if not TWICE:
        write(to + 2 * D + n * 3 * D, owned | padding, dv, E, E0, E1)
    write(to + D + n * 3 * D, owned | padding, dk, E, E0, E1)
