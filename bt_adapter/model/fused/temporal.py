"""Compute the temporal update of a branch layer, ``fc(s·out(attention(qkv(n))))`` over time, and its gradients.

n is the normalised state of the patch rows, ``[B, N, D]``, and s the scale of stochastic depth, one per sequence.
``out`` and ``fc`` are linear layers with only that scale between them, so one matrix product can replace both:
``fc(s·out(a)) = s·(a·Jᵀ + fc_w·out_b) + fc_b`` with J = fc_w·out_w. Computing J and the gradients of both weights from
its own costs as much as 3·D products of one row with a weight; J saves 3 such products per row. It is therefore used
for D rows or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bt_adapter.towers.products import input_grad, input_grad_behind, linear, weight_grad
from bt_adapter.towers.rows import bias_grad
from bt_kernels import passes


class Weights(NamedTuple):
    """The parameters of the update, in the order of the gradients that :func:`backward` returns."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor


def forward(
    n: Tensor, w: Weights, heads: int, scale: Tensor | None, visible: tuple, backend: str | None,
    stream: Tensor | None = None,
):  # fmt: skip
    """Compute the update ``[B, N, D]``, and return it with the tensors that :func:`backward` needs.

    Args:
        n: normalised state of the patch rows, ``[B, N, D]``.
        scale: scale s of each row, ``[B, N, 1]``; None: 1.
        visible: the visible tokens as arguments of the ops. backend: name of a forced backend, or None.
        stream: state ``[B, 1+N, D]`` that the last product adds the update to; the sum is then returned in place of the
            update.
    """
    qkv = linear(n, w.qkv_weight, w.qkv_bias)
    attended = _attend(qkv, heads, visible, backend)
    if is_joint_cheaper(n):
        joint = input_grad(w.fc_weight.to(n.dtype), w.out_weight)
        if scale is None:
            bias = torch.addmv(w.fc_bias, w.fc_weight, w.out_bias)
            return _add_product(attended, joint, bias, stream, backend), (qkv, joint)
        bias = w.fc_weight @ w.out_bias
        if stream is None:
            return linear(attended, joint, bias).mul_(scale).add_(w.fc_bias), (qkv, joint)
        summed = passes.linear_add(attended, joint, bias, stream, scale[:, :, 0], w.fc_bias, backend)
        return summed, (qkv, joint)
    mixed = linear(attended, w.out_weight, w.out_bias)
    if scale is not None:
        mixed.mul_(scale)
    return _add_product(mixed, w.fc_weight, w.fc_bias, stream, backend), (qkv, mixed)


def backward(
    grad: Tensor, n: Tensor, kept: tuple, w: Weights, heads: int, scale: Tensor | None, visible: tuple,
    backend: str | None, dtype: torch.dtype | None = None, behind_cls: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Compute the gradients of n and of the weights from that of the update.

    kept: from :func:`forward`. dtype: of the weights' gradients where ``products.weight_grad`` can write it.
    behind_cls: write the gradient of n behind a row of zeros for CLS, ``[B, 1+N, D]``.
    """
    qkv, other = kept
    attended = _attend(qkv, heads, visible, backend)
    scaled = grad if scale is None else (grad * scale).to(grad.dtype)  # draws are float32 under autocast too
    fc_bias_grad = bias_grad(grad, dtype)
    if is_joint_cheaper(n):
        grad_attended = input_grad(scaled, other)
        joint_grad, summed = weight_grad(scaled, attended), fc_bias_grad if scale is None else bias_grad(scaled, dtype)
        fc_weight, out_weight = w.fc_weight.to(grad.dtype), w.out_weight.to(grad.dtype)
        fc_weight_grad = weight_grad(joint_grad.t(), out_weight.t(), dtype)
        fc_weight_grad.addr_(summed.to(fc_weight_grad.dtype), w.out_bias.to(fc_weight_grad.dtype))
        out_grads = (weight_grad(fc_weight, joint_grad, dtype), summed.to(grad.dtype) @ fc_weight)
    else:
        fc_weight_grad = weight_grad(grad, other, dtype)
        grad_mixed = input_grad(scaled, w.fc_weight)
        out_grads = (weight_grad(grad_mixed, attended, dtype), bias_grad(grad_mixed, dtype))
        grad_attended = input_grad(grad_mixed, w.out_weight)
    grad_qkv = passes.temporal_attention_backward(
        _split_heads(grad_attended, 1, heads)[:, :, 0], _split_heads(qkv, 3, heads), visible, backend
    ).flatten(2)
    grads = (
        weight_grad(grad_qkv, n, dtype), bias_grad(grad_qkv, dtype), *out_grads, fc_weight_grad, fc_bias_grad,
    )  # fmt: skip
    return (input_grad_behind if behind_cls else input_grad)(grad_qkv, w.qkv_weight), grads


def _add_product(x: Tensor, weight: Tensor, bias: Tensor, stream: Tensor | None, backend: str | None) -> Tensor:
    if stream is None:
        return linear(x, weight, bias)
    return passes.linear_add(x, weight, bias, stream, None, None, backend)


def is_joint_cheaper(n: Tensor) -> bool:
    """Whether one product for ``out`` and ``fc`` takes less work than two, for so many rows."""
    return n.shape[0] * n.shape[1] >= n.shape[2]


def _attend(qkv: Tensor, heads: int, visible: tuple, backend: str | None) -> Tensor:
    return passes.temporal_attention(_split_heads(qkv, 3, heads), visible, backend).flatten(2)


def _split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    return x.unflatten(2, (parts, heads, -1))
