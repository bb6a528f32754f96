"""Compute LayerNorms, residual sums and gradients of biases outside of autograd, on states ``[B, rows, D]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """The parameters of a LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


def has_kernels(x: Tensor) -> bool:
    """Whether sums, LayerNorms and activations are computed by the row ops of ``bt_kernels``.

    On a CPU torch's operators, some of them in place, are faster; a compiler fuses torch's operators itself.
    """
    return x.device.type != "cpu" and not torch.compiler.is_compiling()


def normalize(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a LayerNorm in the dtype of ``x``.

    Returns:
        The result, and each row's mean and reciprocal standard deviation, which :func:`normalize_backward` needs.
    """
    dtype = x.dtype
    return torch.native_layer_norm(x, (x.shape[-1],), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


def normalize_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a LayerNorm's input, weight and bias."""
    dtype = x.dtype
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), x, (x.shape[-1],), mean, rstd, norm.weight.to(dtype), norm.bias.to(dtype), [True, True, True]
    )


def bias_grad(grad: Tensor) -> Tensor:
    """Compute the gradient of a linear layer's bias, the sum over all rows."""
    return grad.sum((0, 1))


def add_rows(z: Tensor, update: Tensor) -> Tensor:
    """Add an update ``[B, 1+N, D]``, or one of the patch rows alone ``[B, N, D]``, to the state z ``[B, 1+N, D]``."""
    if update.shape == z.shape:
        return z + update
    if torch.compiler.is_compiling():  # the compiler takes no view as out=, and fuses this sum
        return z + F.pad(update, (0, 0, 1, 0))
    out = torch.empty_like(z)
    out[:, :1] = z[:, :1]
    torch.add(z[:, 1:], update, out=out[:, 1:])
    return out
