"""What every update of a layer is made of: LayerNorm, biases and residuals on the rows of ``[B, rows, D]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm's parameters."""

    weight: Tensor
    bias: Tensor
    eps: float


def norm(x: Tensor, by: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` normalised, and each row's mean and 1/deviation for :func:`norm_backward`."""
    dtype = x.dtype
    return torch.native_layer_norm(x, (x.shape[-1],), by.weight.to(dtype), by.bias.to(dtype), by.eps)


def norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, by: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias."""
    dtype = x.dtype
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), x, (x.shape[-1],), mean, rstd, by.weight.to(dtype), by.bias.to(dtype), [True, True, True]
    )


def bias_grad(grad: Tensor) -> Tensor:
    """Gradient of a product's bias."""
    return grad.sum((0, 1))


def add_rows(z: Tensor, update: Tensor) -> Tensor:
    """``z`` plus ``update``, which may lack the CLS row."""
    if update.shape == z.shape:
        return z + update
    if torch.compiler.is_compiling():  # takes no out= that is part of a tensor, and fuses this
        return z + F.pad(update, (0, 0, 1, 0))
    out = torch.empty_like(z)
    out[:, :1] = z[:, :1]
    torch.add(z[:, 1:], update, out=out[:, 1:])
    return out
