"""Forward and backward passes of the ops as plain functions, for an autograd function that contains them.

An autograd function that fuses several steps (a whole layer, for example) calls these instead of the public ops, which
are differentiable themselves. Nothing here is recorded by autograd, cast by autocast or checked for shapes: call it in
the forward or backward of a ``torch.autograd.Function``, with tensors of one dtype. ``torch.compile`` and dispatch
modes see each call as one registered op.

``visible`` is a :class:`bt_kernels.VisibleTokens` as a tuple (:meth:`~bt_kernels.VisibleTokens.as_arguments`), whose
tensors an autograd function can save. ``backend`` is the name of a backend or None, as everywhere; a function that
wants its backward to run where its forward ran keeps :func:`forced_backend` of its forward.

Legend: B videos, T frames, P patches, N visible rows, S slots (or frames when ragged), H heads, E head width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bt_kernels._dispatch import forced_backend as _forced_backend
from bt_kernels._layout import patch_rows
from bt_kernels._library import OPS

__all__ = [
    "bias_gelu",
    "bias_gelu_backward",
    "forced_backend",
    "gather_merge",
    "gather_merge_backward",
    "linear_add",
    "mlp",
    "mlp_hidden_grad",
    "patch_rows",
    "residual_norm",
    "residual_norm_backward",
    "spatial_attention",
    "spatial_attention_backward",
    "temporal_attention",
    "temporal_attention_backward",
]

Visible = tuple[Tensor, Tensor | None, int, int, int | None]


def forced_backend(requested: str | None = None) -> str | None:
    """Return the backend that applies now: ``requested``, else that of the innermost block or the environment, or None.

    Raises:
        ValueError: the name is not that of a backend.
    """
    return _forced_backend(requested)


def gather_merge(
    backbone: Tensor, branch: Tensor, gate: Tensor | None, visible: Visible, backend: str | None
) -> Tensor:
    """Compute :func:`bt_kernels.gather_merge` of ``backbone`` [B, T, 1+P, D] and ``branch`` [B, 1+N, D]."""
    return OPS["gather_merge"].forward(backbone, branch, gate, *visible, backend)


def gather_merge_backward(
    grad: Tensor,
    backbone: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    visible: Visible,
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of backbone, branch and gate; one that ``needs`` does not ask for is an empty tensor.

    ``grad`` is the gradient of the result, ``[B, 1+N, D]``.
    """
    return OPS["gather_merge"].backward(grad, backbone, branch, gate, *visible, list(needs), backend)


def temporal_attention(qkv: Tensor, visible: Visible, backend: str | None) -> Tensor:
    """Compute :func:`bt_kernels.temporal_attention` of ``qkv`` [B, N, 3, H, E]: ``[B, N, H, E]``."""
    return OPS["temporal_attention"].forward(qkv, *visible, backend)


def temporal_attention_backward(grad: Tensor, qkv: Tensor, visible: Visible, backend: str | None) -> Tensor:
    """Return the gradient of ``qkv`` [B, N, 3, H, E] from that of the result, ``grad`` [B, N, H, E]."""
    return OPS["temporal_attention"].backward(grad, qkv, *visible, [True], backend)


def spatial_attention(
    qkv: Tensor, frame_weight: Tensor | None, visible: Visible, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`bt_kernels.spatial_attention` of ``qkv`` [B, 1+N, 3, H, E].

    Returns:
        The result ``[B, 1+N, H, E]``, and what the backward reads: the log-sum-exp of the scores of each frame's
        queries, and each frame's result of the CLS query ``[B, S, H, E]``, in float32 or wider.
    """
    return OPS["spatial_attention"].forward(qkv, frame_weight, *visible, backend)


def spatial_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    frame_weight: Tensor | None,
    visible: Visible,
    results: tuple[Tensor, Tensor, Tensor],
    backend: str | None,
) -> Tensor:
    """Return the gradient of ``qkv`` from that of the result, ``grad`` [B, 1+N, H, E].

    ``results`` are the three tensors that :func:`spatial_attention` returned.
    """
    return OPS["spatial_attention"].backward(grad, qkv, frame_weight, *visible, *results, [True], backend)


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    scale: Tensor | None,
    norm: tuple[Tensor, Tensor, float],
    dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`bt_kernels.residual_norm`; ``norm`` is ``(weight, bias, eps)``.

    Returns:
        The sum (of size 0 without an update), its LayerNorm in ``dtype``, and mean and reciprocal standard deviation of
        each row of the sum, ``[B, R]`` in float32 or wider.
    """
    return OPS["residual_norm"].forward(x, update, scale, *norm, dtype, backend)


def residual_norm_backward(
    grad_summed: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    update: Tensor | None,
    scale: Tensor | None,
    norm: tuple[Tensor, Tensor, float],
    summed: Tensor,
    moments: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, update, weight and bias; one that ``needs`` does not ask for is an empty tensor.

    ``summed`` and ``moments`` (mean and reciprocal standard deviation) are of :func:`residual_norm`. With an update,
    only shape and dtype of ``x`` and ``update`` are read. Without one ``summed`` is not read, and ``grad_summed`` is
    the gradient that x has from elsewhere.
    """
    backward = OPS["residual_norm"].backward
    return backward(grad_summed, grad_normed, x, update, scale, *norm, None, summed, *moments, list(needs), backend)


def bias_gelu(x: Tensor, bias: Tensor | None, act: str, backend: str | None) -> Tensor:
    """Compute :func:`bt_kernels.bias_gelu` of ``x`` [..., F]."""
    return OPS["bias_gelu"].forward(x, bias, act, backend)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, act: str, needs: Sequence[bool], backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias; one that ``needs`` does not ask for is an empty tensor."""
    return OPS["bias_gelu"].backward(grad, x, bias, act, list(needs), backend)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stream: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Compute :func:`bt_kernels.linear_add` of ``x`` [B, Q, K] and ``stream`` [B, R, D]."""
    return OPS["linear_add"].forward(x, weight, bias, stream, scale, offset, backend)


def mlp(
    x: Tensor,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    act: str,
    stream: Tensor | None,
    scale: Tensor | None,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`bt_kernels.mlp` of ``x`` [B, Q, D]; ``fc1`` and ``fc2`` are weight and bias.

    Returns:
        The result and, with ``keep``, the argument of the activation ``[B, Q, F]``, otherwise a tensor of size 0.
    """
    return OPS["mlp"].forward(x, *fc1, *fc2, stream, scale, act, keep, backend)


def mlp_hidden_grad(
    grad: Tensor, fc2_weight: Tensor, hidden: Tensor, act: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the activation's argument from ``grad`` [B, Q, E], that of the second product's result.

    Args:
        hidden: the argument of the activation, ``[B, Q, F]``.

    Returns:
        The gradient of ``hidden``, and the activation for the gradient of ``fc2_weight``, in the dtype of ``hidden``;
        the gradient of the first product's bias ``[F]``, in float32 or wider.
    """
    return OPS["mlp_hidden_grad"].forward(grad, fc2_weight, hidden, act, backend)
