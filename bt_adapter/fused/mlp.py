"""The MLP's update, ``fc2(act(fc1(n)))`` of all rows n, [..., D].

Quick-GELU, x·sigmoid(c·x) with c = 1.702, is silu(c·x)/c: both factors go onto the rows of D beside the products, and
what is left between them is torch's own SiLU, one pass forward and one backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.fused.rows import bias_grad
from bt_adapter.products import input_grad, linear, weight_grad

_QUICK = 1.702


class Weights(NamedTuple):
    """Parameters, in the order of :func:`backward`'s gradients."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def hidden(n: Tensor, w: Weights, quick: bool) -> Tensor:
    """``fc1(n)``, times c for quick-GELU: what backward wants kept, or computes again."""
    return linear(n * _QUICK, w.fc1_weight, w.fc1_bias * _QUICK) if quick else linear(n, w.fc1_weight, w.fc1_bias)


def finish(y: Tensor, x: Tensor, w: Weights, quick: bool) -> Tensor:
    """``y`` plus the update, from :func:`hidden`'s result x."""
    if quick:
        return torch.add(y, linear(F.silu(x), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    return y + linear(F.gelu(x), w.fc2_weight, w.fc2_bias)


def add_(y: Tensor, n: Tensor, w: Weights, quick: bool) -> None:
    """Add the update of ``n`` to ``y``, where nothing is kept for backward."""
    x = hidden(n, w, quick)
    if quick:
        y.add_(linear(F.silu(x, inplace=True), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    else:
        y.add_(linear(torch.ops.aten.gelu_(x), w.fc2_weight, w.fc2_bias))


def backward(grad: Tensor, n: Tensor, x: Tensor, w: Weights, quick: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of n and of the weights; ``x`` of :func:`hidden`."""
    fc2_grads = weight_grad(grad / _QUICK if quick else grad, F.silu(x) if quick else F.gelu(x)), bias_grad(grad)
    grad_x = input_grad(grad, w.fc2_weight)
    act_backward = torch.ops.aten.silu_backward if quick else torch.ops.aten.gelu_backward
    act_backward.grad_input(grad_x, x, grad_input=grad_x)
    grads = weight_grad(grad_x, n), bias_grad(grad_x), *fc2_grads
    return input_grad(grad_x, w.fc1_weight), grads
