"""quantize_rows in Triton: a row is read once, held in registers, and written once.

Legend: M rows, D width, W the next power of two, N rows that a program processes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import adjacent
from bt_kernels.ops.quantize_rows.reference import LARGEST, SMALLEST_AMAX

_ROWS = 2  # N
_PER_THREAD = 16  # elements of a program: 16 bytes of float8


@triton.jit(do_not_specialize=["M"])
def _forward(
    rows, values, scale, row_stride, M, D,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Quantise N rows."""
    r, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, W)
    exists, far = r < M, r.to(tl.int64)[:, None]
    used = exists[:, None] & (d < D)[None, :]
    x = tl.load(rows + far * row_stride + d[None, :], mask=used, other=0.0).to(tl.float32)
    # The bits of floats without sign are ordered as the floats are, with NaN above all: a maximum keeps it.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    factor = tl.where(largest < SMALLEST, SMALLEST, largest) * (1 / LARGEST)
    quotient = tl.div_rn(x, tl.broadcast_to(factor[:, None], [N, W]))  # rounded as torch rounds it
    clamped = tl.clamp(quotient, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values + far * D + d[None, :], clamped.to(tl.float8e4nv), mask=used)
    tl.store(scale + r, factor, mask=exists)


def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = adjacent(rows)
    count, width = rows.shape
    values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(max(width, 16))
    warps = max(1, min(16, block * _ROWS // (32 * _PER_THREAD)))
    launch(
        _forward, triton.cdiv(count, _ROWS), rows, values, scale, rows.stride(0), count, width,
        LARGEST=LARGEST, SMALLEST=SMALLEST_AMAX, W=block, N=_ROWS, warps=warps, warps_per_sm=32,
    )  # fmt: skip
    return values, scale
