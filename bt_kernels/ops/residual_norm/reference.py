"""Definition of residual_norm in plain PyTorch. Legend: B sequences, R rows of each, D width."""

import torch
from torch import Tensor


def forward(x, update, scale, weight, bias, eps, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum (of size 0 without an update), its LayerNorm, and mean and rstd ``[B, R]``."""
    summed = x if update is None else _add(x, update, scale)
    normed, mean, rstd = _norm_rows(summed, weight, bias, eps)
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
        grad, *of_weights = _norm_rows_backward(grad_normed, rows, mean, rstd, weight, needs[2:])
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


def _norm_rows(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of ``rows [..., D]`` and its mean and rstd ``[...]``, all in float32 or wider."""
    acc = torch.promote_types(rows.dtype, torch.float32)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(
        rows.to(acc), rows.shape[-1:], weight.to(acc), bias.to(acc), eps
    )
    return normed, mean[..., 0], rstd[..., 0]


def _norm_rows_backward(
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
