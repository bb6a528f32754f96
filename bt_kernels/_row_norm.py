"""LayerNorm of the patch rows that a gather writes: in plain PyTorch for the references, and the CPU's C++.

Legend: B videos, N visible rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels._layout import zero_padding


def normalise(out: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of ``out[:, 1:]``: ``[B, N, D]`` (zeros where the index is -1), and mean and 1/deviation ``[B, N]``."""
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = out[:, 1:].to(wide)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(rows, rows.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return zero_padding(normed, index).to(out.dtype), mean[..., 0], rstd[..., 0]


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
    """Gradient of the gathered rows ``[B, 1+N, D]`` from both results', in float32 or wider; of weight and bias."""
    wide = torch.promote_types(out.dtype, torch.float32)
    total = torch.zeros(out.shape, dtype=wide, device=out.device) if grad_out is None else grad_out.to(wide)
    if grad_normed is None:
        nothing = [torch.zeros_like(weight) if need else None for need in needs]
        return total, nothing[0], nothing[1]
    grad = zero_padding(grad_normed, index).to(wide)
    rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, out[:, 1:].to(wide), [out.shape[-1]], mean[..., None], rstd[..., None], weight.to(wide), weight.to(wide),
        [True, needs[0], needs[1]],
    )  # fmt: skip
    total = torch.cat([total[:, :1], total[:, 1:] + rows], 1)
    weight_bias = [None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
    return total, weight_bias[0], weight_bias[1]


def fake_norm(out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of a gather's results with a norm, from its result without: out, normed, mean, rstd."""
    batch, rows, width = out.shape
    wide = torch.promote_types(out.dtype, torch.float32)
    mean = out.new_empty(batch, rows - 1, dtype=wide)
    return out, out.new_empty(batch, rows - 1, width), mean, torch.empty_like(mean)


def native_norm(out: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`normalise` in C++ (csrc/cpu/row_norm.cpp)."""
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
    """:func:`normalise_backward` in C++; the rows' gradient in their dtype."""
    if grad_normed is None:
        return grad_out, torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.ops.bt_kernels_native.row_norm_backward(grad_out, grad_normed, out, weight, index, mean, rstd)
