"""alignment_loss in chunks of rows, so that no tensor of N·F elements is stored. Shared by Triton and C++.

torch computes the matrix products with the library of each device. A backend provides the two remaining passes over
rows, ``gather_norm`` and ``cosine``. Rows are those of ``branch`` [B·(1+N), D]: a video's CLS row counts as padding, so
no row of the branch is copied.

Legend: B, T, P, N, D; F width of the shared space.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_kernels.ops.alignment_loss.gradients import count_of, stored


def chunk_rows(device: torch.device) -> int:
    """Return the rows of a chunk. A GPU needs many for its multiprocessors; a CPU's caches hold fewer."""
    return 4096 if device.type == "cpu" else 32768


class RowKernels(Protocol):
    """The kernels of a backend, on ``count`` rows from ``first`` on.

    Row i is token i % (1+N) of video i // (1+N). Its place p·T + t is that of ``index`` [B, N], in which a CLS row has
    none. Rows whose place is -1, or that have none, are not read and become zeros.
    """

    def gather_norm(
        self, target: Tensor, index: Tensor, first: int, count: int, weight: Tensor, bias: Tensor, eps: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Apply LayerNorm to the tower's tokens at the places of the rows: ``[count, D]`` in ``dtype``."""

    def cosine(
        self, y: Tensor, b: Tensor, index: Tensor, first: int, gain: Tensor, shift: Tensor, eps: float, grads: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the sum over the rows of 2 - 2·cos(a, b), ``[]``, where a = LayerNorm(y); with ``grads`` also its
        gradient in y, ``[count, F]`` in ``dtype``, and those in bias, gain and shift, ``[3, F]``; else neither is
        read."""


def forward(
    kernels: RowKernels, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps,
    target_eps, product, wanted,
):  # fmt: skip
    """Return the loss (a mean over the tokens) and the gradients of the sum over the tokens."""
    batch, tokens = index.shape
    dtype, width, shared = branch.dtype, branch.shape[2], head_weight.shape[0]
    acc, operand = torch.promote_types(dtype, torch.float32), _operand_dtype(branch, product)
    weight, projection = head_weight.to(operand), target_projection.to(operand)
    bias, gain, shift = _vector(head_bias, acc), _vector(head_norm_weight, acc), _vector(head_norm_bias, acc)
    norm_weight, norm_bias = _vector(target_norm_weight, acc), _vector(target_norm_bias, acc)
    projection_bias = None if target_projection_bias is None else target_projection_bias.to(acc)
    index, all_rows = index.contiguous(), branch.reshape(-1, width)
    # Padding of a ragged batch may hold NaN, which a product would spread.
    hidden = F.pad(index < 0, (1, 0), value=True).view(-1, 1) if slots is None else None
    of_branch, of_weight, of_vectors = stored(wanted)
    needs_grads, rows_at_once = any(wanted), chunk_rows(branch.device)
    losses, grad_rows, grad_weights, sums = [], [], [], []
    for first in range(0, batch * (1 + tokens), rows_at_once):
        rows = all_rows[first : first + rows_at_once].to(operand)
        if hidden is not None:
            rows = rows.masked_fill(hidden[first : first + rows_at_once], 0)
        y = _product(rows, weight.T, acc, bias)
        b = kernels.gather_norm(target, index, first, len(rows), norm_weight, norm_bias, target_eps, operand)
        b = _product(b, projection.T, acc, projection_bias)
        loss, grad_y, row_sums = kernels.cosine(y, b, index, first, gain, shift, head_eps, needs_grads, operand)
        losses.append(loss)
        if of_branch:
            grad_rows.append(_product(grad_y, weight, acc).to(dtype))
        if of_weight:
            grad_weights.append(_product(grad_y.T, rows, acc))
        if of_vectors:
            sums.append(row_sums)
    return (
        (_total(losses, branch, acc) / count_of(index, slots)).to(dtype),
        _join(grad_rows, branch) if of_branch else branch.new_empty(0),
        _total(grad_weights, branch, acc, shared, width) if of_weight else branch.new_empty(0, dtype=acc),
        _total(sums, branch, acc, 3, shared) if of_vectors else branch.new_empty(0, dtype=acc),
    )


def _vector(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a vector as the kernels read it."""
    return tensor.to(dtype).contiguous()


def _join(parts: list[Tensor], branch: Tensor) -> Tensor:
    """Return the rows of all chunks in the shape of ``branch``."""
    rows = parts[0] if len(parts) == 1 else torch.cat([branch.new_empty(0, branch.shape[2]), *parts])
    return rows.view(branch.shape)


def _total(parts: list[Tensor], like: Tensor, dtype: torch.dtype, *size: int) -> Tensor:
    """Add up the parts of all chunks; zeros of a size if there are none."""
    if len(parts) == 1:
        return parts[0]
    total = like.new_zeros(size, dtype=dtype)
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
