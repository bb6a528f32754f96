"""alignment_loss in chunks of rows, so that no tensor of N·F elements is stored. Shared by Triton and C++.

torch computes the matrix products with the library of each device. A backend provides the two remaining passes over
rows, ``gather_norm`` and ``cosine``. Rows are those of ``branch`` [B·(1+N), D]: a video's CLS row counts as padding, so
no row of the branch is copied.

Legend: B, T, P, N, D; F width of the shared space, C rows of a chunk, M = B·(1+N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_kernels.ops.alignment_loss.gradients import count_of

CHUNK = 4096


class RowKernels(Protocol):
    """The kernels of a backend. ``places`` [C] are p·T + t, or -1; rows of -1 are not read and become zeros."""

    def product_dtype(self, branch: Tensor) -> torch.dtype:
        """Return the dtype of the operands of the matrix products; the results are in float32 or wider."""

    def gather_norm(
        self, target: Tensor, places: Tensor, first: int, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """Apply LayerNorm to the tower's tokens at ``places`` [M] from row ``first`` on: ``[C, D]`` in ``dtype``."""

    def cosine(
        self, y: Tensor, b: Tensor, places: Tensor, gain: Tensor, shift: Tensor, eps: float, grads: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return 2 - 2·cos(a, b) of each row, ``[C]``, where a = LayerNorm(y); with ``grads`` also its gradient in y,
        ``[C, F]`` in ``dtype``, and those of bias, gain and shift summed over the rows, ``[3, F]``."""


@dataclass(frozen=True)
class Head:
    """Tensors of the alignment head: the weight in the dtype of the products, the others in that of the sums."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor


def forward(
    kernels: RowKernels, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps,
    target_eps, wanted,
):  # fmt: skip
    """Return the loss (a mean over the tokens) and the gradients of the sum over the tokens."""
    batch, tokens = index.shape
    dtype, width, shared = branch.dtype, branch.shape[2], head_weight.shape[0]
    acc, operand = torch.promote_types(dtype, torch.float32), kernels.product_dtype(branch)
    head = Head(
        head_weight.to(operand), *(t.to(acc).contiguous() for t in (head_bias, head_norm_weight, head_norm_bias))
    )
    norm_weight, norm_bias = (t.to(acc).contiguous() for t in (target_norm_weight, target_norm_bias))
    projection = target_projection.to(operand)
    projection_bias = None if target_projection_bias is None else target_projection_bias.to(acc)
    places = F.pad(index, (1, 0), value=-1).flatten()  # CLS precedes the rows of each video and is not compared
    rows_in = branch.reshape(-1, width)
    needs_grads = any(wanted)
    losses = branch.new_empty(len(places), dtype=acc)
    grad_rows = branch.new_empty(len(places) if wanted[0] else 0, width)
    grad_weight = branch.new_zeros((shared, width) if wanted[1] else 0, dtype=acc)
    sums = branch.new_zeros((3, shared), dtype=acc)
    for first in range(0, len(places), CHUNK):
        last = min(first + CHUNK, len(places))
        part = places[first:last]
        rows = rows_in[first:last].to(operand)
        if slots is None:  # padding may hold NaN, which a product would spread
            rows = rows.masked_fill(part[:, None] < 0, 0)
        y = _product(rows, head.weight.T, acc).add_(head.bias)
        b = kernels.gather_norm(target, places, first, norm_weight, norm_bias, target_eps, operand)[: last - first]
        b = _product(b, projection.T, acc)
        if projection_bias is not None:
            b.add_(projection_bias)
        losses[first:last], grad_y, row_sums = kernels.cosine(
            y, b, part, head.gain, head.shift, head_eps, needs_grads, operand
        )
        if needs_grads:
            sums += row_sums
        if wanted[0]:
            grad_rows[first:last] = _product(grad_y, head.weight, acc)
        if wanted[1]:
            grad_weight += _product(grad_y.T, rows, acc)
    loss = (losses.sum() / count_of(index)).to(dtype)
    grads = [grad_rows.view(branch.shape) if wanted[0] else grad_rows, grad_weight]
    grads += [each if want else each.new_empty(0) for each, want in zip(sums.unbind(0), wanted[2:], strict=True)]
    return loss, *(g.clone() if g.dim() == 1 else g for g in grads)


def _product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """Multiply a·b in ``acc``: 16-bit operands are summed in float32 and the result is not rounded to 16 bits."""
    if a.dtype == acc:
        return a @ b
    return torch.mm(a, b, out_dtype=acc)
