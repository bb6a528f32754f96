"""Parts of the Triton kernels of gather_embed and gather_merge that write rows of the branch.

A program writes the CLS row of a video (its first program) or R patch rows (each other program). Rows of index -1
become zeros and are not read.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton_rows import ROWS_AT_ONCE, ROWS_WITH_SUMS, row_options


@triton.jit
def row_places(index, index_b, b, n, N, T):
    """Return the token and the frame (int32) of patch rows n of video b, and whether each row is visible."""
    place = tl.load(index + b * index_b + n, mask=n < N, other=-1).to(tl.int32)  # divisions of 64 bits are slow
    return 1 + place // T, place % T, place >= 0


@triton.jit
def write_rows(value, out, b, n, N, d, inside, D):
    """Store patch rows n, [R], of video b from ``value`` [R, W]."""
    written = (n < N)[:, None] & inside[None, :]
    at = out + ((b * (1 + N) + 1 + n) * D)[:, None] + d[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=written)


def plan_rows(
    index: Tensor, width: int, dtype: torch.dtype, warps_per_sm: int | Mapping[int, int] = 32
) -> tuple[int, dict]:
    """Return the number of programs of a gather that writes rows of ``dtype``, and the options of its launch."""
    batch, tokens = index.shape
    rows = ROWS_AT_ONCE if dtype.itemsize == 2 else ROWS_WITH_SUMS
    programs = batch * (1 + triton.cdiv(tokens, rows))
    return programs, {"R": rows, **row_options(width, dtype, warps_per_sm=warps_per_sm)}
