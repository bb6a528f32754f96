"""The MLP's update, ``fc2(act(fc1(n)))`` of all rows n, [B, 1+N, D].

Quick-GELU, x·sigmoid(c·x) with c = 1.702, is silu(c·x)/c: both factors go into the products beside it, where they cost
nothing, and what is left is torch's own SiLU, one pass forward and one backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.fused.rows import bias_grad, product, product_backward, weight_grad

_QUICK = 1.702


class Weights(NamedTuple):
    """Parameters, in the order of :func:`backward`'s gradients."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def hidden(n: Tensor, w: Weights, quick: bool) -> Tensor:
    """``fc1(n)``, times c for quick-GELU: what backward wants kept, or computes again."""
    return _product(n, w.fc1_weight, w.fc1_bias, _QUICK) if quick else product(n, w.fc1_weight, w.fc1_bias)


def finish(x: Tensor, w: Weights, quick: bool) -> Tensor:
    """The update from :func:`hidden`'s result."""
    if quick:
        return _product(F.silu(x), w.fc2_weight, w.fc2_bias, 1 / _QUICK, bias_scale=1.0)
    return product(F.gelu(x), w.fc2_weight, w.fc2_bias)


def backward(grad: Tensor, n: Tensor, x: Tensor, w: Weights, quick: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of n and of the weights; ``x`` of :func:`hidden`."""
    grad_x = product_backward(grad, w.fc2_weight)
    fc2_grad = weight_grad(grad, F.silu(x), 1 / _QUICK) if quick else weight_grad(grad, F.gelu(x))
    grad_x = torch.ops.aten.silu_backward(grad_x, x) if quick else torch.ops.aten.gelu_backward(grad_x, x)
    grads = (weight_grad(grad_x, n), bias_grad(grad_x), fc2_grad, bias_grad(grad))
    return product_backward(grad_x, w.fc1_weight), grads


def _product(x: Tensor, weight: Tensor, bias: Tensor, scale: float, bias_scale: float | None = None) -> Tensor:
    """``scale·x·weightᵀ + bias_scale·bias``, both scales alike where none is given."""
    beta = scale if bias_scale is None else bias_scale
    rows = torch.addmm(bias.to(x.dtype), x.flatten(0, 1), weight.to(x.dtype).t(), beta=beta, alpha=scale)
    return rows.view(*x.shape[:2], -1)
