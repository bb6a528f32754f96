"""The MLP's update, ``fc2(act(fc1(n)))`` of all rows n, [..., D].

``act`` is named as Hugging Face names it: "quick_gelu", "gelu", or "gelu_pytorch_tanh". Quick-GELU, x·sigmoid(c·x) with
c = 1.702, is silu(c·x)/c: both factors go onto the rows of D beside the products, and what is left between them is
torch's own SiLU, one pass forward and one backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.towers.products import input_grad, linear, weight_grad
from bt_adapter.towers.rows import bias_grad

_QUICK = 1.702
GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""torch's name of the approximation, of each activation that is a GELU."""


class Weights(NamedTuple):
    """Parameters, in the order of :func:`backward`'s gradients."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def activate(x: Tensor, act: str) -> Tensor:
    """``act(x)``; quick-GELU is x·sigmoid(1.702·x)."""
    return x * torch.sigmoid(_QUICK * x) if act == "quick_gelu" else F.gelu(x, approximate=GELU[act])


def hidden(n: Tensor, w: Weights, act: str) -> Tensor:
    """``fc1(n)``, times c for quick-GELU: what backward wants kept, or computes again."""
    if act == "quick_gelu":
        return linear(n * _QUICK, w.fc1_weight, w.fc1_bias * _QUICK)
    return linear(n, w.fc1_weight, w.fc1_bias)


def finish(y: Tensor, x: Tensor, w: Weights, act: str) -> Tensor:
    """``y`` plus the update, from :func:`hidden`'s result x."""
    if act == "quick_gelu":
        return torch.add(y, linear(F.silu(x), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    return y + linear(F.gelu(x, approximate=GELU[act]), w.fc2_weight, w.fc2_bias)


def add_(y: Tensor, n: Tensor, w: Weights, act: str) -> None:
    """Add the update of ``n`` to ``y``, where nothing is kept for backward."""
    x = hidden(n, w, act)
    if act == "quick_gelu":
        y.add_(linear(F.silu(x, inplace=True), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    else:
        y.add_(linear(torch.ops.aten.gelu_(x, approximate=GELU[act]), w.fc2_weight, w.fc2_bias))


def backward(grad: Tensor, n: Tensor, x: Tensor, w: Weights, act: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of n and of the weights; ``x`` of :func:`hidden`."""
    grad_x = input_grad(grad, w.fc2_weight)
    if act == "quick_gelu":
        of_weight = weight_grad(grad / _QUICK, F.silu(x))
        torch.ops.aten.silu_backward.grad_input(grad_x, x, grad_input=grad_x)
    else:
        of_weight = weight_grad(grad, F.gelu(x, approximate=GELU[act]))
        torch.ops.aten.gelu_backward.grad_input(grad_x, x, approximate=GELU[act], grad_input=grad_x)
    fc2_grads = of_weight, bias_grad(grad)
    grads = weight_grad(grad_x, n), bias_grad(grad_x), *fc2_grads
    return input_grad(grad_x, w.fc1_weight), grads
