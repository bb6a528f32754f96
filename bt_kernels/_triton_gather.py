"""Parts of the Triton kernels of gather_embed and gather_merge that write rows of the branch.

A program writes the CLS row of a video (its first program) or R patch rows (each other program). Rows of index -1
become zeros and are not read. With a norm the patch rows are also normalised, after rounding.

Legend: B videos, T frames, P patches, N visible rows of a video, D width, W the next power of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton_rows import ROWS_AT_ONCE, ROWS_WITH_SUMS, layer_norm, row_options, sum_dtype


@triton.jit
def row_places(index, index_b, b, n, N, T):
    """Return the token and the frame (int32) of patch rows n of video b, and whether each row is visible."""
    place = tl.load(index + b * index_b + n, mask=n < N, other=-1).to(tl.int32)  # divisions of 64 bits are slow
    return 1 + place // T, place % T, place >= 0


@triton.jit
def write_rows(
    value, out, norm_weight, norm_bias, normed, mean, rstd, b, n, visible, N, d, inside, D, eps, ACC: tl.constexpr
):  # fmt: skip
    """Store patch rows n, [R], of video b from ``value`` [R, W], and their LayerNorm unless ``normed`` is None."""
    columns = d[None, :]
    value = value.to(out.dtype.element_ty)
    written = (n < N)[:, None] & inside[None, :]
    tl.store(out + ((b * (1 + N) + 1 + n) * D)[:, None] + columns, value, mask=written)
    if normed is not None:
        row, centre, scale = layer_norm(value.to(ACC), inside, D, eps)
        weight = tl.load(norm_weight + d, mask=inside, other=0.0).to(ACC)
        bias = tl.load(norm_bias + d, mask=inside, other=0.0).to(ACC)
        row = tl.where(visible[:, None], row * weight[None, :] + bias[None, :], 0.0)
        tl.store(normed + ((b * N + n) * D)[:, None] + columns, row.to(normed.dtype.element_ty), mask=written)
        tl.store(mean + b * N + n, centre, mask=n < N)
        tl.store(rstd + b * N + n, scale, mask=n < N)


class RowResults:
    """Empty results of a gather: ``out`` [B, 1+N, D], and with a norm ``normed`` [B, N, D], ``mean`` and ``rstd``.

    ``like`` [..., D] has their dtype; the tower's tokens may have another.
    """

    def __init__(
        self,
        like: Tensor,
        index: Tensor,
        norm: tuple[Tensor, Tensor, float] | None,
        warps_per_sm: int | Mapping[int, int] = 32,
    ):
        batch, tokens = index.shape
        width = like.shape[-1]
        self.out = like.new_empty(batch, 1 + tokens, width)
        self.normed = self.mean = self.rstd = self.weight = self.bias = None
        self.eps = 0.0
        if norm:
            self.weight, self.bias, self.eps = norm[0].contiguous(), norm[1].contiguous(), norm[2]
            self.normed = like.new_empty(batch, tokens, width)
            self.mean, self.rstd = (like.new_empty(batch, tokens, dtype=sum_dtype(like.dtype)) for _ in range(2))
        self.rows = ROWS_AT_ONCE if like.dtype.itemsize == 2 and not norm else ROWS_WITH_SUMS
        self.programs = batch * (1 + triton.cdiv(tokens, self.rows))
        self.options = dict(R=self.rows, **row_options(width, like.dtype, warps_per_sm=warps_per_sm))

    def arguments(self) -> tuple:
        """Return the tensors in the order in which the kernels take them."""
        return self.out, self.weight, self.bias, self.normed, self.mean, self.rstd

    def returned(self) -> tuple[Tensor, ...]:
        """Return (out,), with a norm (out, normed, mean, rstd)."""
        return tuple(each for each in (self.out, self.normed, self.mean, self.rstd) if each is not None)
