"""Run one branch layer, with temporal attention, spatial attention and MLP, as a single autograd function.

The tensors stored for backward depend on the recompute policy. Their size is given in rows of D per token
(``bench/step.py`` counts the bytes):

    "none"   the layer's input; q, k, v and the output projection's result of temporal attention (or the weight of the
             joint product, see ``temporal``); the state before spatial attention; its q, k, v and result; the state
             before the MLP; the result of fc1: 15 rows
    "mlp"    the same without the result of fc1, which backward recomputes: 11 rows
    "layer"  only the layer's input: 1 row; backward recomputes everything but fc2

Norms, activations and the attention over time are recomputed under every policy, because they contain no matrix product
with a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_adapter.model.fused import spatial, temporal
from bt_adapter.towers import mlp
from bt_adapter.towers.products import convert
from bt_adapter.towers.rows import (
    Norm,
    RowKernels,
    add_and_normalize,
    find_kernels,
    normalize,
    normalize_backward,
    normalize_patches_backward,
)
from bt_kernels import VisibleTokens, passes
from bt_kernels.nn.stochastic_depth import frame_weight_and_row_scale, sequence_row_scale


class Layer(NamedTuple):
    """The options of a layer's computation.

    Attributes:
        heads: number of attention heads.
        temporal_eps, spatial_eps: epsilon of the LayerNorms.
        act: activation of the MLP.
        recompute: "none", "mlp" or "layer".
        backend: name of a forced backend of the ops, or None.
        product: dtype of the matrix products.
        kernels: the row ops that compute sums, LayerNorms and the activation, or None.
        sizes: the visible tokens' arguments of the ops that are not tensors.
    """

    heads: int
    temporal_eps: float
    spatial_eps: float
    act: str
    recompute: str
    backend: str | None
    product: torch.dtype
    kernels: RowKernels | None
    sizes: tuple


class Scales(NamedTuple):
    """The scales of stochastic depth; None without drops.

    Attributes:
        temporal: scale of each patch row in the temporal update, ``[B, N, 1]``.
        frame_weight: weight of each frame in CLS's mean, ``[B, S]``.
        spatial: scale of each row in the spatial update, ``[B, 1+N, 1]``.
    """

    temporal: Tensor | None
    frame_weight: Tensor | None
    spatial: Tensor | None


def run_layer(
    z: Tensor,
    temporal_layer: Any,
    spatial_layer: Any,
    visible: VisibleTokens,
    time_scale: Tensor | None,
    space_scale: Tensor | None,
    recompute: str = "none",
    products: str = "torch",
) -> Tensor:
    """Compute ``spatial_layer(temporal_layer(z))`` from the parameters of the two layers.

    Args:
        z: the branch's state, ``[B, 1+N, D]``, CLS first.
        temporal_layer, spatial_layer: a ``TemporalLayer`` and a ``SpatialLayer`` of ``model.branch``.
        visible: the tokens that the branch processes.
        time_scale: scale of each sequence by stochastic depth, ``[B, sequences]``, or None.
        space_scale: scale of each frame by stochastic depth, ``[B, steps]``, or None.
        recompute: activations that backward recomputes: "none", "mlp" or "layer".
        products: library of the products that can add or activate before they write: "torch" or "bt_kernels".

    Returns:
        The new state, ``[B, 1+N, D]``.

    Raises:
        ValueError: ``products`` is "bt_kernels", but only torch's operators can run on ``z``.
    """
    scales = Scales(None, None, None)
    if time_scale is not None:
        scales = scales._replace(temporal=sequence_row_scale(time_scale, visible))
    if space_scale is not None:
        frame_weight, rows = frame_weight_and_row_scale(space_scale, visible)
        scales = scales._replace(frame_weight=frame_weight, spatial=rows)
    device = z.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
    if z.dtype == torch.float64:
        product = z.dtype
    index, frame_counts, *sizes = visible.as_arguments()
    if not torch.is_grad_enabled():
        recompute = "layer"  # nothing is stored, and each part's tensors are freed before the next part runs
    layer = Layer(
        temporal_layer.attention.heads, temporal_layer.norm.eps, spatial_layer.norm1.eps, spatial_layer.act,
        recompute, passes.forced_backend(), product, find_kernels(z, products), tuple(sizes),
    )  # fmt: skip
    norms = (temporal_layer.norm, spatial_layer.norm1, spatial_layer.norm2)
    weights = [
        *(parameter for norm in norms for parameter in (norm.weight, norm.bias)),
        *_projections(temporal_layer.attention), temporal_layer.fc.weight, temporal_layer.fc.bias,
        *_projections(spatial_layer.attention),
        spatial_layer.fc1.weight, spatial_layer.fc1.bias, spatial_layer.fc2.weight, spatial_layer.fc2.bias,
    ]  # fmt: skip
    return _Layer.apply(layer, z, index, frame_counts, *scales, *weights)


def _projections(attention: Any) -> tuple[Tensor, ...]:
    out = attention.out_proj
    return attention.qkv_weight, attention.packed_bias(), out.weight, out.bias


class _Parts:
    """The tensors of a call by name, and the arguments of the temporal and the spatial functions.

    ``dtype`` is that of the parameters, and so of their gradients. With row ops the weights of all products are
    converted to the products' dtype together.
    """

    def __init__(self, layer: Layer, index: Tensor, frame_counts: Tensor | None, scales: Scales, weights):
        self.layer, self.scales = layer, scales
        self.visible = (index, frame_counts, *layer.sizes)
        self.dtype = weights[6].dtype
        if layer.kernels is not None:  # the op that adds the bias of fc1, weights[17], takes it as it is
            first, last = weights[6:17], weights[18:]
            converted = convert([*first, *last], layer.product)
            weights = [*weights[:6], *converted[: len(first)], weights[17], *converted[len(first) :]]
        self.norm = Norm(weights[0], weights[1], layer.temporal_eps)
        self.norm1 = Norm(weights[2], weights[3], layer.spatial_eps)
        self.norm2 = Norm(weights[4], weights[5], layer.spatial_eps)
        self.temporal = temporal.Weights(*weights[6:12])
        self.spatial = spatial.Weights(*weights[12:16])
        self.mlp = mlp.Weights(*weights[16:20])

    def temporal_call(self) -> tuple[temporal.Weights, int, Tensor | None, tuple, str | None]:
        return self.temporal, self.layer.heads, self.scales.temporal, self.visible, self.layer.backend

    def spatial_call(self) -> tuple[spatial.Weights, int, Tensor | None, tuple, str | None]:
        return self.spatial, self.layer.heads, self.scales.frame_weight, self.visible, self.layer.backend


def _run_attentions(z: Tensor, parts: _Parts, keep: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run temporal and spatial attention.

    Returns:
        The normalised input of the MLP, the state before that norm, and the tensors that backward needs: two of the
        temporal update, the state between the two updates, four of the spatial update; none if ``keep`` is False.
    """
    n, *_ = normalize(z[:, 1:], parts.norm, parts.layer.product, parts.layer.kernels)
    x, n, of_time = _add_attention(temporal.forward, n, parts.temporal_call(), z, None, parts.norm1, parts.layer)
    if not keep:
        of_time = ()
    scale = parts.scales.spatial
    y, n, of_space = _add_attention(spatial.forward, n, parts.spatial_call(), x, scale, parts.norm2, parts.layer)
    return n, y, (*of_time, x, *of_space) if keep else ()


def _add_attention(
    forward: Callable, n: Tensor, call: tuple, stream: Tensor, scale: Tensor | None, norm: Norm, layer: Layer
) -> tuple[Tensor, Tensor, tuple]:
    """Add an attention's scaled update to the stream, inside its last product where ``layer.kernels`` have that.

    Returns:
        The sum, its LayerNorm, and the tensors that the attention's backward needs.
    """
    if layer.kernels is None or not layer.kernels.products:
        update, kept = forward(n, *call)
        return *add_and_normalize(stream, update, scale, norm, layer.product, layer.kernels), kept
    scaled = {} if scale is None else {"scale": scale}
    x, kept = forward(n, *call, stream=stream, **scaled)
    n, *_ = normalize(x, norm, layer.product, layer.kernels)
    return x, n, kept


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, z, index, frame_counts, temporal_scale, frame_weight, spatial_scale, *weights):
        scales = Scales(temporal_scale, frame_weight, spatial_scale)
        parts = _Parts(layer, index, frame_counts, scales, weights)
        with torch.autocast(z.device.type, enabled=False):
            n, y, kept = _run_attentions(z, parts, layer.recompute != "layer")
            out, hidden = mlp.run(y, n, parts.mlp, layer.act, layer.kernels, layer.recompute == "none")
        if kept:
            kept = (y, *kept) if hidden is None else (y, *kept, hidden)
        ctx.layer = layer
        ctx.save_for_backward(z, index, frame_counts, *scales, *weights, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        z, index, frame_counts, *rest = ctx.saved_tensors
        layer, product, kernels = ctx.layer, ctx.layer.product, ctx.layer.kernels
        parts = _Parts(layer, index, frame_counts, Scales(*rest[:3]), rest[3:23])
        with torch.autocast(z.device.type, enabled=False):
            if len(rest) == 23:
                _, y, kept = _run_attentions(z, parts, True)
            else:
                y, *kept = rest[23:]
            qkv, other, x, *attention = kept
            n, *moments = normalize(y, parts.norm2, product, kernels)
            stored = len(attention) == 5
            hidden = attention.pop() if stored else mlp.compute_hidden(n, parts.mlp, layer.act, kernels)
            grad_n, mlp_grads = mlp.backward(grad.to(product), n, hidden, parts.mlp, layer.act, kernels, parts.dtype)
            del hidden
            rows = y.shape[1]
            grad, grad_update, *norm2_grads = normalize_backward(
                grad_n, grad, y, moments, parts.norm2, kernels, rows, parts.scales.spatial
            )
            n, *moments = normalize(x, parts.norm1, product, kernels)
            grad_n, spatial_grads = spatial.backward(grad_update, n, attention, *parts.spatial_call(), parts.dtype)
            grad, grad_update, *norm1_grads = normalize_backward(
                grad_n, grad, x, moments, parts.norm1, kernels, rows - 1
            )
            n, *moments = normalize(z[:, 1:], parts.norm, product, kernels)
            grad_n, temporal_grads = temporal.backward(
                grad_update, n, (qkv, other), *parts.temporal_call(), parts.dtype, kernels is not None
            )
            grad, *norm_grads = normalize_patches_backward(grad_n, grad, z, moments, parts.norm, kernels)
        grads = (*norm_grads, *norm1_grads, *norm2_grads, *temporal_grads, *spatial_grads, *mlp_grads)
        return None, grad, None, None, None, None, None, *grads
