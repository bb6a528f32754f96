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


def chunk_rows(device: torch.device) -> int:
    """Return the rows of a chunk. A GPU needs many for its multiprocessors; a CPU's caches hold fewer."""
    return 4096 if device.type == "cpu" else 32768


class RowKernels(Protocol):
    """The kernels of a backend. ``places`` [C] are p·T + t, or -1; rows of -1 are not read and become zeros."""

    def gather_norm(
        self,
        target: Tensor,
        places: Tensor,
        first: int,
        count: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Apply LayerNorm to the tower's tokens at ``count`` of ``places`` [M] from ``first`` on: ``[count, D]`` in
        ``dtype``."""

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
    target_eps, product, wanted,
):  # fmt: skip
    """Return the loss (a mean over the tokens) and the gradients of the sum over the tokens."""
    batch, tokens = index.shape
    dtype, width, shared = branch.dtype, branch.shape[2], head_weight.shape[0]
    acc, operand = torch.promote_types(dtype, torch.float32), _operand_dtype(branch, product)
    head = Head(
        head_weight.to(operand), *(t.to(acc).contiguous() for t in (head_bias, head_norm_weight, head_norm_bias))
    )
    norm_weight, norm_bias = (t.to(acc).contiguous() for t in (target_norm_weight, target_norm_bias))
    projection = target_projection.to(operand)
    projection_bias = None if target_projection_bias is None else target_projection_bias.to(acc)
    places = F.pad(index, (1, 0), value=-1).flatten()  # CLS precedes the rows of each video and is not compared
    rows_in = branch.reshape(-1, width)
    needs_grads = any(wanted)
    chunk = chunk_rows(branch.device)
    losses, grad_rows, grad_weights, sums = [], [], [], []
    for first in range(0, len(places), chunk):
        part = places[first : first + chunk]
        rows = rows_in[first : first + chunk].to(operand)
        if slots is None:  # padding may hold NaN, which a product would spread
            rows = rows.masked_fill(part[:, None] < 0, 0)
        y = _product(rows, head.weight.T, acc, head.bias)
        b = kernels.gather_norm(target, places, first, len(part), norm_weight, norm_bias, target_eps, operand)
        b = _product(b, projection.T, acc, projection_bias)
        of_rows, grad_y, row_sums = kernels.cosine(y, b, part, head.gain, head.shift, head_eps, needs_grads, operand)
        losses.append(of_rows)
        if needs_grads:
            sums.append(row_sums)
        if wanted[0]:
            grad_rows.append(_product(grad_y, head.weight, acc).to(dtype))
        if wanted[1]:
            grad_weights.append(_product(grad_y.T, rows, acc))
    loss = (_join(losses, branch.new_empty(0, dtype=acc)).sum() / count_of(index, slots)).to(dtype)
    grads = [
        _join(grad_rows, branch.new_empty(0, width)).view(branch.shape) if wanted[0] else branch.new_empty(0),
        _total(grad_weights, branch, shared, width) if wanted[1] else branch.new_empty(0, dtype=acc),
    ]
    of_head = _total(sums, branch, 3, shared).unbind(0)
    grads += [each if want else each.new_empty(0) for each, want in zip(of_head, wanted[2:], strict=True)]
    return loss, *(g.clone() if g.dim() == 1 else g for g in grads)


def _join(parts: list[Tensor], empty: Tensor) -> Tensor:
    """Return the rows of all chunks; ``empty`` if there are none."""
    return parts[0] if len(parts) == 1 else torch.cat([empty, *parts])


def _total(parts: list[Tensor], like: Tensor, *size: int) -> Tensor:
    """Add up the parts of all chunks; zeros of a size, in float32 or wider, if there are none."""
    if len(parts) == 1:
        return parts[0]
    total = like.new_zeros(size, dtype=torch.promote_types(like.dtype, torch.float32))
    for part in parts:
        total += part
    return total


def _operand_dtype(branch: Tensor, product: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the operands of the matrix products; the results are in float32 or wider.

    On a CPU torch does not sum 16-bit operands in float32.
    """
    if branch.device.type == "cpu":
        return torch.promote_types(branch.dtype, torch.float32)
    return branch.dtype if product is None else product


def _product(a: Tensor, b: Tensor, acc: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Compute a·b + bias in ``acc``: 16-bit operands are summed in float32 and the result is not rounded to 16 bits."""
    if a.dtype == acc:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    product = torch.mm(a, b, out_dtype=acc)
    return product if bias is None else product.add_(bias)
