"""alignment_loss in chunks of rows, so that nothing of size N·F is ever stored. Shared by Triton and C++.

Products of matrices go to torch, whose library knows each device; our kernels are the two passes over rows beside them,
``gather_norm`` and ``cosine``, which a backend brings. Rows are those of ``branch`` [B·(1+N), D]: a video's CLS row
counts as padding, so that no row of the branch is ever copied.

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
    """What a backend brings. ``places`` [C] are p·T + t, or -1; rows of -1 are not read and come out as zeros."""

    def product_dtype(self, branch: Tensor) -> torch.dtype:
        """What the products' operands are in for this ``branch``; their results are in float32 or wider."""

    def gather_norm(
        self, target: Tensor, places: Tensor, first: int, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """LayerNorm of the tower's tokens at ``places`` [M] from row ``first`` on: ``[C, D]`` in ``dtype``."""

    def cosine(
        self, y: Tensor, b: Tensor, places: Tensor, gain: Tensor, shift: Tensor, eps: float, grads: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """With a = LayerNorm(y): 2 - 2·cos(a, b) of each row ``[C]``; if ``grads`` its gradient in y, ``[C, F]`` in
        ``dtype``, and its sums over rows for bias, gain and shift, ``[3, F]``."""


@dataclass(frozen=True)
class Head:
    """The alignment head's tensors in the dtypes that the products and the sums run in."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor


def forward(
    kernels: RowKernels, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps,
    target_eps, wanted,
):  # fmt: skip
    """The loss, and the gradients of its sum over the tokens."""
    batch, tokens = index.shape
    dtype, width, shared = branch.dtype, branch.shape[2], head_weight.shape[0]
    wide, operand = torch.promote_types(dtype, torch.float32), kernels.product_dtype(branch)
    head = Head(
        head_weight.to(operand), *(t.to(wide).contiguous() for t in (head_bias, head_norm_weight, head_norm_bias))
    )
    norm_weight, norm_bias = (t.to(wide).contiguous() for t in (target_norm_weight, target_norm_bias))
    projection = target_projection.to(operand)
    projection_bias = None if target_projection_bias is None else target_projection_bias.to(wide)
    places = F.pad(
        index, (1, 0), value=-1
    ).flatten()  # CLS stands before each video's rows and is compared with nothing
    rows_in = branch.reshape(-1, width)
    make = any(wanted)
    losses = branch.new_empty(len(places), dtype=wide)
    grad_rows = branch.new_empty(len(places) if wanted[0] else 0, width)
    grad_weight = branch.new_zeros((shared, width) if wanted[1] else 0, dtype=wide)
    sums = branch.new_zeros((3, shared), dtype=wide)
    for first in range(0, len(places), CHUNK):
        last = min(first + CHUNK, len(places))
        here = places[first:last]
        rows = rows_in[first:last].to(operand)
        if slots is None:  # padding may hold anything, and a product would spread it
            rows = rows.masked_fill(here[:, None] < 0, 0)
        y = _product(rows, head.weight.T, wide).add_(head.bias)
        b = kernels.gather_norm(target, places, first, norm_weight, norm_bias, target_eps, operand)[: last - first]
        b = _product(b, projection.T, wide)
        if projection_bias is not None:
            b.add_(projection_bias)
        losses[first:last], grad_y, parts = kernels.cosine(y, b, here, head.gain, head.shift, head_eps, make, operand)
        if make:
            sums += parts
        if wanted[0]:
            grad_rows[first:last] = _product(grad_y, head.weight, wide)
        if wanted[1]:
            grad_weight += _product(grad_y.T, rows, wide)
    loss = (losses.sum() / count_of(index)).to(dtype)
    grads = [grad_rows.view(branch.shape) if wanted[0] else grad_rows, grad_weight]
    grads += [each if want else each.new_empty(0) for each, want in zip(sums.unbind(0), wanted[2:], strict=True)]
    return loss, *(g.clone() if g.dim() == 1 else g for g in grads)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a·b in ``wide``: 16-bit operands are summed in float32 and the result is not rounded back."""
    if a.dtype == wide:
        return a @ b
    return torch.mm(a, b, out_dtype=wide)
