"""bias_gelu in Triton: forward and backward read and write each element once.

Backward adds up the bias's gradient in two stages, the second by torch, so its bits are always the same.

Legend: M rows, F width, C columns and N rows that a program processes at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import accumulator, activation, rows_per_sum, sum_dtype

_COLUMNS, _FORWARD_ROWS, _BACKWARD_ROWS = 512, 8, 4


@triton.jit(do_not_specialize=["M", "blocks"])
def _forward(x, bias, out, M, F, blocks, ACT: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Activate N rows of C columns."""
    pid = tl.program_id(0)
    column = (pid % blocks) * C + tl.arange(0, C)
    row = (pid // blocks) * N + tl.arange(0, N)
    inside = column < F
    used = (row < M)[:, None] & inside[None, :]
    at = (row.to(tl.int64) * F)[:, None] + column[None, :]
    y = tl.load(x + at, mask=used, other=0.0).to(ACC)
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0.0).to(ACC)[None, :]
    share, _ = activation(y, ACT)
    tl.store(out + at, (y * share).to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _backward(
    grad, x, bias, grad_x, sums, M, F, blocks, each,
    ACT: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x in ``each`` rows of C columns, N at a time, and its sum over these rows."""
    pid = tl.program_id(0)
    column = (pid % blocks) * C + tl.arange(0, C)
    inside = column < F
    shift = tl.zeros([C], ACC)
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    total = tl.zeros([N, C], ACC)
    part = pid // blocks
    for begin in range(part * each, tl.minimum(part * each + each, M), N):
        row = begin + tl.arange(0, N)
        used = (row < M)[:, None] & inside[None, :]
        at = (row.to(tl.int64) * F)[:, None] + column[None, :]
        y = tl.load(x + at, mask=used, other=0.0).to(ACC) + shift[None, :]
        share, slope = activation(y, ACT)
        through = tl.load(grad + at, mask=used, other=0.0).to(ACC) * (share + y * slope)
        if grad_x is not None:
            tl.store(grad_x + at, through.to(grad_x.dtype.element_ty), mask=used)
        if sums is not None:
            total += through
    if sums is not None:
        tl.store(sums + part.to(tl.int64) * F + column, tl.sum(total, 0), mask=inside)


def _options(act: str, dtype: torch.dtype, rows: int) -> dict:
    return {"ACT": act, "ACC": accumulator(dtype), "C": _COLUMNS, "N": rows, "warps": 4, "warps_per_sm": 20}


def forward(x, bias, act) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    blocks = triton.cdiv(width, _COLUMNS)
    launch(
        _forward, blocks * triton.cdiv(rows, _FORWARD_ROWS), x, bias, out, rows, width, blocks,
        **_options(act, x.dtype, _FORWARD_ROWS),
    )  # fmt: skip
    return out


def backward(grad, x, bias, act, needs) -> tuple[Tensor | None, Tensor | None]:
    grad, x, bias = grad.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    grad_x = torch.empty_like(x) if needs[0] else None
    each = rows_per_sum(rows)
    blocks, parts = triton.cdiv(width, _COLUMNS), triton.cdiv(rows, each)
    sums = None
    if needs[1] and bias is not None:
        sums = torch.empty(parts, width, dtype=sum_dtype(x.dtype), device=x.device)
    launch(
        _backward, blocks * parts, grad, x, bias, grad_x, sums, rows, width, blocks, each,
        **_options(act, x.dtype, _BACKWARD_ROWS),
    )  # fmt: skip
    return grad_x, None if sums is None else sums.sum(0).to(bias.dtype)
