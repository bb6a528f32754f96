"""LayerNorm of rows, and of the patch rows that a gather writes, in plain PyTorch (for the references) and in C++.

Legend: B videos, N visible rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels._layout import zero_padding


def norm_rows(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of ``rows [..., D]`` and its mean and rstd ``[...]``, all in float32 or wider."""
    acc = torch.promote_types(rows.dtype, torch.float32)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(
        rows.to(acc), rows.shape[-1:], weight.to(acc), bias.to(acc), eps
    )
    return normed, mean[..., 0], rstd[..., 0]


def norm_rows_backward(
    grad: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the rows, in float32 or wider, and those needed of weight and bias, in weight's dtype."""
    acc = torch.promote_types(rows.dtype, torch.float32)
    grad_rows, *of_weights = torch.ops.aten.native_layer_norm_backward(
        grad.to(acc), rows.to(acc), [rows.shape[-1]], mean[..., None], rstd[..., None], weight.to(acc), weight.to(acc),
        [True, *needs],
    )  # fmt: skip
    grad_weight, grad_bias = (
        each.to(weight.dtype) if need else None for each, need in zip(of_weights, needs, strict=True)
    )
    return grad_rows, grad_weight, grad_bias


def normalise(out: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of ``out[:, 1:]``, ``[B, N, D]`` (0 where index is -1), and mean and rstd, ``[B, N]``."""
    normed, mean, rstd = norm_rows(out[:, 1:], weight, bias, eps)
    return zero_padding(normed, index).to(out.dtype), mean, rstd


def normalise_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the gathered rows ``[B, 1+N, D]``, in float32 or wider, of the weight and of the bias."""
    acc = torch.promote_types(out.dtype, torch.float32)
    total = torch.zeros(out.shape, dtype=acc, device=out.device) if grad_out is None else grad_out.to(acc)
    if grad_normed is None:
        zeros = [torch.zeros_like(weight) if need else None for need in needs]
        return total, zeros[0], zeros[1]
    grad = zero_padding(grad_normed, index)
    rows, grad_weight, grad_bias = norm_rows_backward(grad, out[:, 1:], mean, rstd, weight, needs)
    return torch.cat([total[:, :1], total[:, 1:] + rows], 1), grad_weight, grad_bias


def fake_norm(out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty out, normed, mean and rstd for a gather with a norm; ``out`` is its result without one."""
    batch, rows, width = out.shape
    acc = torch.promote_types(out.dtype, torch.float32)
    mean = out.new_empty(batch, rows - 1, dtype=acc)
    return out, out.new_empty(batch, rows - 1, width), mean, torch.empty_like(mean)


def native_norm(out: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`normalise` in C++ (csrc/cpu/row_norm.cpp)."""
    return torch.ops.bt_kernels_native.row_norm(out, weight, bias, index, eps)


def native_norm_backward(
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    out: Tensor,
    weight: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute :func:`normalise_backward` in C++; the gradient of the rows has their dtype."""
    if grad_normed is None:
        return grad_out, torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.ops.bt_kernels_native.row_norm_backward(grad_out, grad_normed, out, weight, index, mean, rstd)
