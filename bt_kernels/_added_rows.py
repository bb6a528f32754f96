"""References of the ops that add rows to a residual stream, in plain PyTorch. Legend: x [B, Q, K], stream [B, R, D]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def widest(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x·weightᵀ + bias`` without rounding."""
    acc = widest(x)
    return F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))


def add_rows(
    rows: Tensor, stream: Tensor | None, scale: Tensor | None, dtype: torch.dtype, offset: Tensor | None = None
) -> Tensor:
    """Add ``scale · rows + offset`` to the last rows of the stream; without a stream return them in ``dtype``."""
    if scale is not None:
        rows = scale.to(rows.dtype)[:, :, None] * rows
    if offset is not None:
        rows = rows + offset.to(rows.dtype)
    if stream is None:
        return rows.to(dtype, memory_format=torch.contiguous_format)
    first = stream.shape[1] - rows.shape[1]
    last = (stream[:, first:].to(rows.dtype) + rows).to(stream.dtype)
    return torch.cat([stream[:, :first], last], 1) if first else last.contiguous()


def gradient_of_rows(grad: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """Return the gradient of the added rows, ``[B, Q, D]`` in the dtype of x, from that of the sum."""
    rows = grad[:, grad.shape[1] - x.shape[1] :]
    if scale is not None:
        rows = scale.to(widest(x))[:, :, None] * rows
    return rows.to(x.dtype)


def gradient_of_stream(grad: Tensor, stream: Tensor) -> Tensor:
    """Return the gradient of the stream: a copy, since a registered op must not return its arguments."""
    return grad.to(stream.dtype, copy=True, memory_format=torch.contiguous_format)


def product_grads(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias of a product from that of its result; sums are rounded once."""
    grad_x = (grad @ weight).contiguous() if needs[0] else None
    rows = grad.flatten(0, -2)
    grad_weight = (rows.t() @ x.flatten(0, -2)).contiguous() if needs[1] else None
    grad_bias = rows.sum(0, dtype=widest(x)).to(bias.dtype) if needs[2] and bias is not None else None
    return grad_x, grad_weight, grad_bias
