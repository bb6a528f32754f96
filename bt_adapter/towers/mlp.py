"""Compute the MLP of a transformer layer, ``fc2(act(fc1(n)))``, and its gradients.

``act`` is an activation by its name in Hugging Face's configurations: "quick_gelu", "gelu" or "gelu_pytorch_tanh".
Quick-GELU, x·sigmoid(c·x) with c = 1.702, equals silu(c·x)/c. The factor c is applied to the input of ``fc1`` and 1/c
to the output of ``fc2``, which have D columns instead of the MLP's width, so torch's SiLU kernel can be used.

Legend: D width, M width of the MLP; n is the normalised input, ``[..., D]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bt_kernels
from bt_adapter.towers.products import input_grad, linear, weight_grad
from bt_adapter.towers.rows import RowKernels, bias_grad
from bt_kernels import bias_gelu, passes

_QUICK = 1.702
GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""For each activation that is a GELU, the value of the argument ``approximate`` of torch's GELU."""


class Weights(NamedTuple):
    """The parameters of the MLP, in the order of the gradients that :func:`backward` returns."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def activate(x: Tensor, act: str) -> Tensor:
    """Apply an activation to ``x``."""
    return x * torch.sigmoid(_QUICK * x) if act == "quick_gelu" else F.gelu(x, approximate=GELU[act])


def compute_hidden(n: Tensor, w: Weights, act: str, kernels: RowKernels | None = None) -> Tensor:
    """Compute the input of the activation, ``[..., M]``, which :func:`backward` needs.

    It is ``fc1(n)``, for quick-GELU multiplied by c; with ``kernels`` without c and, unless they have products of their
    own, without the bias, which they add themselves.
    """
    if kernels is not None:
        return linear(n, w.fc1_weight, w.fc1_bias if kernels.products else None)
    if act == "quick_gelu":
        return linear(n * _QUICK, w.fc1_weight, w.fc1_bias * _QUICK)
    return linear(n, w.fc1_weight, w.fc1_bias)


def run(
    y: Tensor, n: Tensor, w: Weights, act: str, kernels: RowKernels | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute ``y`` plus the MLP's output for ``n``, and with ``keep`` the result of :func:`compute_hidden`."""
    if kernels is not None and kernels.products:
        out, hidden = passes.mlp(n, w[:2], w[2:], act, y, None, keep, kernels.backend)
    else:
        hidden = compute_hidden(n, w, act, kernels)
        out = add_output(y, hidden, w, act, kernels)
    return out, hidden if keep else None


def add_output(y: Tensor, x: Tensor, w: Weights, act: str, kernels: RowKernels | None = None) -> Tensor:
    """Compute ``y`` plus the MLP's output, ``[..., D]``, from the result x of :func:`compute_hidden`."""
    if kernels is not None:
        activated = passes.bias_gelu(x, w.fc1_bias, act, kernels.backend)
        return y + linear(activated, w.fc2_weight, w.fc2_bias)
    if act == "quick_gelu":
        return torch.add(y, linear(F.silu(x), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    return y + linear(F.gelu(x, approximate=GELU[act]), w.fc2_weight, w.fc2_bias)


def add_output_(y: Tensor, n: Tensor, w: Weights, act: str) -> None:
    """Add the MLP's output for ``n`` to ``y`` in place, with no tensor kept for backward."""
    x = compute_hidden(n, w, act)
    if act == "quick_gelu":
        y.add_(linear(F.silu(x, inplace=True), w.fc2_weight, w.fc2_bias * _QUICK), alpha=1 / _QUICK)
    else:
        y.add_(linear(torch.ops.aten.gelu_(x, approximate=GELU[act]), w.fc2_weight, w.fc2_bias))


def compute_output(n: Tensor, w: Weights, act: str) -> Tensor:
    """Compute the MLP's output for ``n [n, s, D]`` with bias and activation in one pass (``bt_kernels.bias_gelu``)."""
    hidden = bias_gelu(linear(n, w.fc1_weight), w.fc1_bias, act)
    return linear(hidden, w.fc2_weight, w.fc2_bias)


def add_output_in_product(y: Tensor, n: Tensor, w: Weights, act: str) -> Tensor:
    """Compute ``y`` plus the MLP's output for ``n [n, s, D]``, both steps inside the products (``bt_kernels.mlp``)."""
    return bt_kernels.mlp(n, *w, act=act, stream=y)


def backward(
    grad: Tensor, n: Tensor, x: Tensor, w: Weights, act: str, kernels: RowKernels | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Compute the gradients of n and of the weights.

    Args:
        grad: gradient of the MLP's output, ``[..., D]``. n: the MLP's input. x: the result of :func:`compute_hidden`
            for the same ``kernels``. dtype: of the weights' gradients where ``products.weight_grad`` can write it.
    """
    if kernels is not None and kernels.products:
        grad_x, activated, of_bias = passes.mlp_hidden_grad(grad, w.fc2_weight, x, act, kernels.backend)
        of_weight, of_bias = weight_grad(grad, activated, dtype), of_bias.to(w.fc1_bias.dtype)
        del activated
        return input_grad(grad_x, w.fc1_weight), (
            weight_grad(grad_x, n, dtype), of_bias, of_weight, bias_grad(grad, dtype),
        )  # fmt: skip
    grad_x = input_grad(grad, w.fc2_weight)
    if kernels is not None:
        activated = passes.bias_gelu(x, w.fc1_bias, act, kernels.backend)
        of_weight = weight_grad(grad, activated, dtype)
        del activated
        grad_x, of_bias = passes.bias_gelu_backward(grad_x, x, w.fc1_bias, act, (True, True), kernels.backend)
    elif act == "quick_gelu":
        of_weight = weight_grad(grad / _QUICK, F.silu(x))
        torch.ops.aten.silu_backward.grad_input(grad_x, x, grad_input=grad_x)
        of_bias = bias_grad(grad_x)
    else:
        of_weight = weight_grad(grad, F.gelu(x, approximate=GELU[act]))
        torch.ops.aten.gelu_backward.grad_input(grad_x, x, approximate=GELU[act], grad_input=grad_x)
        of_bias = bias_grad(grad_x)
    return input_grad(grad_x, w.fc1_weight), (
        weight_grad(grad_x, n, dtype), of_bias, of_weight, bias_grad(grad, dtype),
    )  # fmt: skip
