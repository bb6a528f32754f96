"""Definition of residual_norm in plain PyTorch. Legend: B sequences, R rows of each, D width."""

import torch
from torch import Tensor

from bt_kernels._row_norm import norm_rows, norm_rows_backward


def forward(x, update, scale, weight, bias, eps, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum (of size 0 without an update), its LayerNorm, and mean and rstd ``[B, R]``."""
    summed = x if update is None else _add(x, update, scale)
    normed, mean, rstd = norm_rows(summed, weight, bias, eps)
    return x.new_empty(0) if update is None else summed, normed.to(dtype or x.dtype), mean, rstd


def _add(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    update = update.to(acc)
    if scale is not None:
        update = scale.to(acc)[:, :, None] * update
    first = x.shape[1] - update.shape[1]
    last_rows = (x[:, first:].to(acc) + update).to(x.dtype)
    return torch.cat([x[:, :first], last_rows], 1) if first else last_rows.contiguous()


def backward(grad_summed, grad_normed, x, update, scale, weight, bias, eps, dtype, summed, mean, rstd, needs):
    rows = x if update is None else summed
    acc = torch.promote_types(x.dtype, torch.float32)
    grad_summed = gradient_of_stream(grad_summed, x)
    if grad_normed is None:
        grad = torch.zeros_like(x, dtype=acc) if grad_summed is None else grad_summed.to(acc)
        of_weights = [torch.zeros_like(weight) if need else None for need in needs[2:]]
    else:
        grad, *of_weights = norm_rows_backward(grad_normed, rows, mean, rstd, weight, needs[2:])
        if grad_summed is not None:
            grad = grad + grad_summed
    grad_x = _copy(grad, x.dtype) if needs[0] else None
    grad_update = None
    if needs[1] and update is not None:
        grad_update = grad[:, x.shape[1] - update.shape[1] :]
        if scale is not None:
            grad_update = scale.to(acc)[:, :, None] * grad_update
        grad_update = _copy(grad_update, update.dtype)
    return grad_x, grad_update, *of_weights


def gradient_of_stream(grad_summed: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the gradient of the sum, or None if there is none.

    Without an update the sum has size 0. Autograd may give it a gradient of that size; a layer that calls the backward
    op itself gives the gradient of the stream, in the shape of ``x``.
    """
    return grad_summed if grad_summed is not None and grad_summed.shape == x.shape else None


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy in ``dtype``: a registered op must not return its arguments or one tensor twice."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
