"""A matrix product in Triton that activates, or adds onto a residual stream, before it writes.

Torch's products end where they write, so that a hidden layer is written, read, activated and written again. Here the
sums of a tile, in float32, go through the epilogue while they are still in registers.

The programs are persistent: there are as many as run at a time, and each takes a tile after the other. The tiles of
``GROUP`` blocks of rows come together, so that what they read stays in the L2 cache. From sm_90 on, operands are read
by tensor descriptors (TMA), which cost no registers for addresses: 172 in place of 253 where the result is activated.
Elsewhere, in float32, and where rows are not aligned to 16 bytes, they are read by pointers.

Legend: M rows, K inner width, N columns of the result; a tile has BM rows and BN columns and is summed BK at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import architecture, for_architecture, launch
from bt_kernels._triton_rows import activation


@triton.jit
def _tile(number, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return row block and column block of a tile: row blocks by groups, in each the columns slowest."""
    row_blocks, column_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN)
    of_group = GROUP * column_blocks
    first = number // of_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    place = number % of_group
    return first + place % size, place // size


@triton.jit
def _halves(x, PARTS: tl.constexpr):
    """Cut the columns of a tile into PARTS entries, so that an epilogue holds fewer values at a time."""
    out = (x,)
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        out = _halves(left, PARTS // 2) + _halves(right, PARTS // 2)
    return out


@triton.jit
def _end(
    y, m, n, bias, stream, scale, offset, hidden, before, activated, sums, out, M, N, part, each, skipped,
    ACT: tl.constexpr,
):  # fmt: skip
    """Finish the columns ``n`` of rows ``m`` of a tile, sums ``y`` in float32, and write them."""
    inside = n < N
    used = (m < M)[:, None] & inside[None, :]
    at = (m.to(tl.int64) * N)[:, None] + n[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if hidden is not None:
        tl.store(hidden + at, y.to(hidden.dtype.element_ty), mask=used)
    if before is not None:  # y is the gradient of the activation's result
        x = tl.load(before + at, mask=used, other=0.0).to(tl.float32)
        share, slope = activation(x, ACT)
        tl.store(activated + at, (x * share).to(activated.dtype.element_ty), mask=used)
        y *= share + x * slope
        if sums is not None:
            total = tl.sum(tl.where(used, y, 0.0), 0)
            tl.store(sums + part.to(tl.int64) * N + n, total, mask=inside)
    elif ACT != "none":
        share, _ = activation(y, ACT)
        y *= share
    if scale is not None:
        y *= tl.load(scale + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    if offset is not None:
        y += tl.load(offset + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if stream is not None:
        # a sequence of the stream has ``skipped`` rows before the ``each`` rows that are added to
        row = m.to(tl.int64) + (m // each + 1) * skipped
        at = (row * N)[:, None] + n[None, :]
        y += tl.load(stream + at, mask=used, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["M", "programs", "each", "skipped"])
def _product(
    x, w, bias, stream, scale, offset, hidden, before, activated, sums, out, M, N, K, programs, each, skipped,
    ACT: tl.constexpr, BY_COLUMNS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply x [M, K] by w, [N, K] or with BY_COLUMNS [K, N], and finish each tile by :func:`_end`."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    if TMA:
        from_x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BM, BK])
        if BY_COLUMNS:
            from_w = tl.make_tensor_descriptor(w, [K, N], [N, 1], [BK, BN])
        else:
            from_w = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BN, BK])
    for tile in range(tl.program_id(0), tiles, programs):
        row_block, column_block = _tile(tile, M, N, BM, BN, GROUP)
        total = tl.zeros([BM, BN], tl.float32)
        if TMA:
            for k in tl.range(0, K, BK, num_stages=STAGES):
                a = from_x.load([row_block * BM, k])
                if BY_COLUMNS:
                    b = from_w.load([k, column_block * BN])
                else:
                    b = tl.trans(from_w.load([column_block * BN, k]))
                total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            # rows past the end read the last one; nothing of them is written
            m = tl.minimum(row_block * BM + tl.arange(0, BM), M - 1).to(tl.int64)
            n = tl.minimum(column_block * BN + tl.arange(0, BN), N - 1).to(tl.int64)
            inner = tl.arange(0, BK)
            at_x = x + (m * K)[:, None] + inner[None, :]
            if BY_COLUMNS:
                at_w = w + (inner.to(tl.int64) * N)[:, None] + n[None, :]
                step = BK * N
            else:
                at_w = w + (n * K)[None, :] + inner[:, None]
                step = BK
            for k in tl.range(0, K, BK, num_stages=STAGES):
                if EVEN:
                    a, b = tl.load(at_x), tl.load(at_w)
                else:
                    left = inner < K - k
                    a = tl.load(at_x, mask=left[None, :], other=0.0)
                    b = tl.load(at_w, mask=left[:, None], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
                at_x += BK
                at_w += step
        m = row_block * BM + tl.arange(0, BM)
        cut = _halves(total, PARTS)
        for i in tl.static_range(PARTS):
            n = column_block * BN + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
            _end(cut[i], m, n, bias, stream, scale, offset, hidden, before, activated, sums, out, M, N, row_block, each,
                 skipped, ACT)  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """Sizes of a tile (BM, BN, BK), into how many parts its epilogue cuts it, stages of the pipeline and warps."""

    rows: int
    columns: int
    inner: int
    parts: int
    stages: int
    warps: int


# By architecture. 86, 89 and 120 have 99 KiB of shared memory for a program, as little as the small forms take.
_SMALL = _Form(128, 128, 32, 8, 4, 4)
_LARGE = _Form(128, 256, 64, 8, 3, 8)
_FORMS = {80: _SMALL, 90: _LARGE, 100: _LARGE, 120: _SMALL}
_DESCRIPTORS = (90, 100)  # of these, those that read by tensor descriptors
_FLOAT32 = {80: _Form(64, 64, 32, 2, 3, 4)}
_GROUP = 8
_INTERPRETED_PROCESSORS = 2  # so that tests have programs that take several tiles


def _forms(dtype: torch.dtype) -> dict[int, _Form]:
    return _FLOAT32 if dtype == torch.float32 else _FORMS


def _form(x: Tensor) -> _Form:
    return for_architecture(_forms(x.dtype), architecture(x.device))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied, by torch's setting for its own products."""
    if dtype != torch.float32:
        return "tf32"  # of no effect
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:  # torch before 2.9
        chosen = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if chosen == "tf32" else "ieee"


def row_blocks(x: Tensor) -> int:
    """Return the number of blocks of rows of :func:`multiply`, for the size of ``sums``."""
    return triton.cdiv(x.shape[0], _form(x).rows)


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    stream: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    hidden: Tensor | None = None,
    before: Tensor | None = None,
    activated: Tensor | None = None,
    sums: Tensor | None = None,
    by_columns: bool = False,
) -> None:
    """Write to ``out`` the product of x ``[M, K]`` and ``weight``, finished tile by tile.

    x and what is written are contiguous, and so is ``before``; the others may have any strides.

    Args:
        weight: ``[N, K]``, of which the rows are multiplied; with ``by_columns`` ``[K, N]``.
        bias: ``[N]``, added first. act: applied then, or "none".
        stream: ``[B, R, N]``, added last, where x has Q ≤ R rows of each of B sequences: to the last Q of each. ``out``
            has its shape, and its first R - Q rows are not written.
        scale: factor of each row before that, ``[M]``. offset: ``[N]``, added after the scale.
        hidden: gets the sum before the activation, ``[M, N]``.
        before: the argument of the activation, ``[M, N]``, if the product is the gradient of its result. ``out`` then
            gets the gradient of ``before``, ``activated`` the activation, ``[M, N]``, and ``sums`` those of ``out``'s
            columns over each block of rows, ``[row_blocks(x), N]`` in float32.
    """
    rows, inner = x.shape
    columns = out.shape[-1]
    weight = weight.contiguous()
    bias, stream, scale, offset = (None if t is None else t.contiguous() for t in (bias, stream, scale, offset))
    form = _form(x)
    tiles = triton.cdiv(rows, form.rows) * triton.cdiv(columns, form.columns)
    each, skipped = max(rows, 1), 0
    if stream is not None and rows:
        each = rows // stream.shape[0]
        skipped = stream.shape[1] - each
    aligned = _is_aligned(x, inner) and _is_aligned(weight, columns if by_columns else inner)
    constants = _plan(x.dtype, inner, aligned)
    if x.device.type == "cuda" and for_architecture(constants["TMA"], architecture(x.device)):
        _provide_scratch(x.device)
    programs = min(tiles, _processors(x.device) * (8 // form.warps))
    launch(
        _product, programs, x, weight, bias, stream, scale, offset, hidden, before, activated, sums, out,
        rows, columns, inner, programs, each, skipped, ACT=act, BY_COLUMNS=by_columns, PRECISION=_precision(x.dtype),
        **constants, warps_per_sm=8,
    )  # fmt: skip


@cache
def _plan(dtype: torch.dtype, inner: int, aligned: bool) -> dict[str, Any]:
    """Return what of a launch depends on the form of its tiles, by architecture."""
    forms = _forms(dtype)
    sizes = {"BM": "rows", "BN": "columns", "BK": "inner", "PARTS": "parts", "STAGES": "stages", "warps": "warps"}
    return {
        **{name: {key: getattr(form, size) for key, form in forms.items()} for name, size in sizes.items()},
        "TMA": {key: key in _DESCRIPTORS and aligned for key in forms},
        "EVEN": {key: inner % form.inner == 0 for key, form in forms.items()},
        "GROUP": _GROUP,
    }


def _is_aligned(tensor: Tensor, row: int) -> bool:
    """Return whether tensor descriptors can read rows of ``row`` elements: they begin at multiples of 16 bytes."""
    return row * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def _provide_scratch(device: torch.device) -> None:
    """Give Triton memory for the tensor descriptors, 128 bytes each, that a kernel makes of its arguments."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def flat(x: Tensor) -> Tensor:
    """Return the rows of ``x``, ``[..., K]``, one after the other: ``[M, K]``."""
    return x.flatten(0, -2).contiguous()
