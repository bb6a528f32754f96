"""Compute the spatial update of a branch layer, ``out(attention(qkv(n)))`` inside each frame, and its gradients.

n is the normalised state of all rows, ``[B, 1+N, D]``. The scale of stochastic depth is applied where the update is
added. CLS is a single row: the attention itself averages its results over the frames, with weights if stochastic depth
drops frames (``bt_kernels.nn.stochastic_depth``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bt_adapter.towers.products import input_grad, linear, weight_grad
from bt_adapter.towers.rows import bias_grad
from bt_kernels import passes


class Weights(NamedTuple):
    """The parameters of the update, in the order of the gradients that :func:`backward` returns."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def forward(
    n: Tensor, w: Weights, heads: int, frame_weight: Tensor | None, visible: tuple, backend: str | None,
    stream: Tensor | None = None, scale: Tensor | None = None,
):  # fmt: skip
    """Compute the update ``[B, 1+N, D]``, and return it with the tensors that :func:`backward` needs.

    Args:
        n: normalised state, ``[B, 1+N, D]``.
        frame_weight: weight of each frame in CLS's mean, ``[B, S]``; None: equal weights.
        visible: the visible tokens as arguments of the ops. backend: name of a forced backend, or None.
        stream: state ``[B, 1+N, D]`` that the last product adds the update to; the sum is then returned in place of
            the update. scale: of each row of the update then, ``[B, 1+N, 1]``; None: 1.
    """
    qkv = linear(n, w.qkv_weight, w.qkv_bias)
    split = qkv.unflatten(2, (3, heads, -1))
    attended, lse, cls_out = passes.spatial_attention(split, frame_weight, visible, backend)
    kept = (qkv, attended, lse, cls_out)
    if stream is None:
        return linear(attended.flatten(2), w.out_weight, w.out_bias), kept
    factors = None if scale is None else scale[:, :, 0]
    return passes.linear_add(attended.flatten(2), w.out_weight, w.out_bias, stream, factors, None, backend), kept


def backward(
    grad: Tensor, n: Tensor, kept: tuple, w: Weights, heads: int, frame_weight: Tensor | None, visible: tuple,
    backend: str | None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Compute the gradients of n and of the weights from that of the update.

    kept: from :func:`forward`. dtype: of the weights' gradients where ``products.weight_grad`` can write it.
    """
    qkv, attended, lse, cls_out = kept
    grad_attended = input_grad(grad, w.out_weight).view(attended.shape)
    grad_qkv = passes.spatial_attention_backward(
        grad_attended, qkv.unflatten(2, (3, heads, -1)), frame_weight, visible, (attended, lse, cls_out), backend
    ).flatten(2)
    out_grads = (weight_grad(grad, attended.flatten(2), dtype), bias_grad(grad, dtype))
    return input_grad(grad_qkv, w.qkv_weight), (
        weight_grad(grad_qkv, n, dtype), bias_grad(grad_qkv, dtype), *out_grads,
    )  # fmt: skip
