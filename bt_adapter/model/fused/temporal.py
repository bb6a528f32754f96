"""The temporal update: ``s·fc(out(attention over time(qkv(n))))`` of the patch rows n, [B, N, D].

``out`` and ``fc`` are affine with nothing between them but the scale s of a whole sequence, so they are one product
where that is less work: ``fc(s·out(a)) = s·(a·Jᵀ + fc_w·out_b) + fc_b`` with J = fc_w·out_w. J and the gradients it
hands on take 3·D products of a row, and J saves 3 for each row: it pays from D rows on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bt_adapter.towers.products import input_grad, linear, weight_grad
from bt_adapter.towers.rows import bias_grad


class Weights(NamedTuple):
    """Parameters, in the order of :func:`backward`'s gradients."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor


def forward(n: Tensor, w: Weights, heads: int, scale: Tensor | None, visible: tuple, backend: str | None):
    """The update ``[B, N, D]``, and what backward wants kept. ``scale``: ``[B, N, 1]`` or None."""
    qkv = linear(n, w.qkv_weight, w.qkv_bias)
    attended = _attend(qkv, heads, visible, backend)
    if pays(n):
        joint = input_grad(w.fc_weight.to(n.dtype), w.out_weight)
        bias = w.fc_weight @ w.out_bias
        if scale is None:
            return linear(attended, joint, bias + w.fc_bias), (qkv, joint)
        return linear(attended, joint, bias).mul_(scale).add_(w.fc_bias), (qkv, joint)
    mixed = linear(attended, w.out_weight, w.out_bias)
    if scale is not None:
        mixed.mul_(scale)
    return linear(mixed, w.fc_weight, w.fc_bias), (qkv, mixed)


def backward(
    grad: Tensor, n: Tensor, kept: tuple, w: Weights, heads: int, scale: Tensor | None, visible: tuple,
    backend: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradients of n and of the weights."""
    qkv, other = kept
    attended = _attend(qkv, heads, visible, backend)
    scaled = grad if scale is None else (grad * scale).to(grad.dtype)  # draws are float32 under autocast too
    if pays(n):
        grad_attended = input_grad(scaled, other)
        joint_grad, summed = weight_grad(scaled, attended), bias_grad(scaled)
        fc_weight = w.fc_weight.to(grad.dtype)
        fc_weight_grad = linear(joint_grad, w.out_weight).addr_(summed, w.out_bias.to(grad.dtype))
        out_grads = (weight_grad(fc_weight, joint_grad), summed @ fc_weight)
    else:
        fc_weight_grad = weight_grad(grad, other)
        grad_mixed = input_grad(scaled, w.fc_weight)
        out_grads = (weight_grad(grad_mixed, attended), bias_grad(grad_mixed))
        grad_attended = input_grad(grad_mixed, w.out_weight)
    grad_qkv = torch.ops.bt_kernels.temporal_attention_backward(
        _split_heads(grad_attended, 1, heads)[:, :, 0], _split_heads(qkv, 3, heads), *visible, [True], backend
    ).flatten(2)
    grads = (weight_grad(grad_qkv, n), bias_grad(grad_qkv), *out_grads, fc_weight_grad, bias_grad(grad))
    return input_grad(grad_qkv, w.qkv_weight), grads


def pays(n: Tensor) -> bool:
    """Whether out and fc are one product."""
    return n.shape[0] * n.shape[1] >= n.shape[2]


def _attend(qkv: Tensor, heads: int, visible: tuple, backend: str | None) -> Tensor:
    return torch.ops.bt_kernels.temporal_attention(_split_heads(qkv, 3, heads), *visible, backend).flatten(2)


def _split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    return x.unflatten(2, (parts, heads, -1))
