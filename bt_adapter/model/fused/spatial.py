"""The spatial update: ``s·out(attention inside each frame(qkv(n)))`` of all rows n, [B, 1+N, D].

CLS is one row: its mean over the frames is taken inside the attention, weighted where stochastic depth drew
(``bt_kernels.nn.stochastic_depth``).
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


def forward(
    n: Tensor, w: Weights, heads: int, frame_weight: Tensor | None, scale: Tensor | None, visible: tuple,
    backend: str | None,
):  # fmt: skip
    """The update ``[B, 1+N, D]``, and what backward wants kept. ``scale``: ``[B, 1+N, 1]`` or None."""
    qkv = linear(n, w.qkv_weight, w.qkv_bias)
    split = qkv.unflatten(2, (3, heads, -1))
    attended, lse, cls_out = torch.ops.bt_kernels.spatial_attention(split, frame_weight, *visible, backend)
    update = linear(attended.flatten(2), w.out_weight, w.out_bias)
    return update if scale is None else update.mul_(scale), (qkv, attended, lse, cls_out)


def backward(
    grad: Tensor, n: Tensor, kept: tuple, w: Weights, heads: int, frame_weight: Tensor | None, scale: Tensor | None,
    visible: tuple, backend: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradients of n and of the weights."""
    qkv, attended, lse, cls_out = kept
    if scale is not None:
        grad = (grad * scale).to(grad.dtype)  # draws are float32 under autocast too
    grad_attended = input_grad(grad, w.out_weight).view(attended.shape)
    grad_qkv = torch.ops.bt_kernels.spatial_attention_backward(
        grad_attended, qkv.unflatten(2, (3, heads, -1)), frame_weight, *visible, attended, lse, cls_out, [True], backend
    ).flatten(2)
    out_grads = (weight_grad(grad, attended.flatten(2)), bias_grad(grad))
    return input_grad(grad_qkv, w.qkv_weight), (weight_grad(grad_qkv, n), bias_grad(grad_qkv), *out_grads)
