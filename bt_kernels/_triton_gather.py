"""The forward of gather_embed and gather_merge in Triton: one kernel, specialised by compile-time constants.

m is the tower's row (for CLS the mean over the real frames):
    embed: out = m + pos[1+p] + time[t],          CLS: ½(m + cls + pos[0])
    merge: out = (1 - gate)·branch + gate·m, or branch + m
With NORM it also normalises the patch rows of out, after rounding. Rows of index -1 become zeros and are not read.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two, R rows that a
program processes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import (
    FRAMES_AT_ONCE,
    ROWS_AT_ONCE,
    ROWS_WITH_SUMS,
    adjacent,
    mean_over_frames,
    outer_strides,
    real_frames,
    row_options,
    sum_dtype,
)


@triton.jit
def _merged(value, x, gate, d, inside, GATED: tl.constexpr, ACC: tl.constexpr):
    """Merge the tower's value and the branch's x; the gate applies along the last dimension."""
    if GATED:
        w = tl.load(gate + d, mask=inside, other=0.0).to(ACC)
        value = (1 - w) * x + w * value
    else:
        value += x
    return value


@triton.jit
def _forward(
    tower, branch, gate, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, out, normed, mean, rstd,
    tower_b, tower_t, tower_p, branch_b, branch_n, pos_stride, time_stride, index_b, index_n, N, T, D, parts, eps,
    EMBED: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, COUNTED: tl.constexpr, W: tl.constexpr,
    ACC: tl.constexpr, AT_ONCE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write the CLS row of a video (its first program) or R patch rows (each other program)."""
    pid = tl.program_id(0).to(tl.int64)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    video = tower + b * tower_b
    kind = out.dtype.element_ty
    if part == 0:
        count = real_frames(frame_counts, b, T, COUNTED)
        cls = mean_over_frames(video, tower_t, count, d, inside, ACC, AT_ONCE)
        if EMBED:
            cls += tl.load(pos + d, mask=inside, other=0.0).to(ACC)
            cls = 0.5 * (cls + tl.load(cls_token + d, mask=inside, other=0.0).to(ACC))
        else:
            branch_cls = tl.load(branch + b * branch_b + d, mask=inside, other=0.0).to(ACC)
            cls = _merged(cls, branch_cls, gate, d, inside, GATED, ACC)
        tl.store(out + b * (1 + N) * D + d, cls.to(kind), mask=inside)
    else:
        columns = d[None, :]
        n = (part - 1) * R + tl.arange(0, R)
        place = tl.load(index + b * index_b + n * index_n, mask=n < N, other=-1)
        token, t = 1 + place // T, place % T
        used = (place >= 0)[:, None] & inside[None, :]
        value = tl.load(video + (t * tower_t + token * tower_p)[:, None] + columns, mask=used, other=0.0).to(ACC)
        if EMBED:
            value += tl.load(pos + (token * pos_stride)[:, None] + columns, mask=used, other=0.0).to(ACC)
            value += tl.load(time + (t * time_stride)[:, None] + columns, mask=used, other=0.0).to(ACC)
        else:
            x = tl.load(branch + b * branch_b + ((1 + n) * branch_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
            value = _merged(value, x, gate, columns, inside[None, :], GATED, ACC)
        value = value.to(kind)
        written = (n < N)[:, None] & inside[None, :]
        tl.store(out + ((b * (1 + N) + 1 + n) * D)[:, None] + columns, value, mask=written)
        if NORM:
            x = value.to(ACC)
            centre = tl.sum(x, 1) / D
            centred = tl.where(inside[None, :], x - centre[:, None], 0.0)
            scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
            weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
            bias = tl.load(norm_bias + d, mask=inside, other=0.0).to(ACC)
            row = tl.where(used, centred * scale[:, None] * weight[None, :] + bias[None, :], 0.0)
            tl.store(normed + ((b * N + n) * D)[:, None] + columns, row.to(kind), mask=written)
            tl.store(mean + b * N + n, centre, mask=n < N)
            tl.store(rstd + b * N + n, scale, mask=n < N)


def run_forward(
    tower: Tensor, index: Tensor, frame_counts: Tensor | None, branch: Tensor | None = None, gate: Tensor | None = None,
    tables: tuple[Tensor, Tensor, Tensor] | None = None, norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (out,), with ``norm`` (out, normed, mean, rstd); ``tables`` (cls_token, pos, time) select gather_embed."""
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
        mean, rstd = (tower.new_empty(batch, tokens, dtype=sum_dtype(tower.dtype)) for _ in range(2))
    rows = ROWS_AT_ONCE if tower.dtype.itemsize == 2 and not norm else ROWS_WITH_SUMS
    parts = 1 + triton.cdiv(tokens, rows)
    launch(
        _forward, batch * parts, tower, branch, gate, cls_token, pos, time, weight, bias, index, frame_counts,
        out, normed, mean, rstd, *tower.stride()[:3], *outer_strides(branch, 2), *outer_strides(pos, 1),
        *outer_strides(time, 1), *index.stride(), tokens, frames, width, parts, eps, EMBED=tables is not None,
        GATED=gate is not None, NORM=norm is not None, COUNTED=frame_counts is not None, AT_ONCE=FRAMES_AT_ONCE,
        R=rows, **row_options(width, tower.dtype, resident_warps=32),
    )  # fmt: skip
    return tuple(each for each in (out, normed, mean, rstd) if each is not None)
