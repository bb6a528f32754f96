"""One branch layer, temporal and spatial attention and the MLP, as a single autograd function.

What it keeps for backward, in rows of D a token (``bench/step.py`` counts them):

    "none"   its input; q, k, v and the result of ``out`` in time (or the one product's weights, where that pays); the
             state before the spatial half; q, k, v and attention in space; the state before the MLP; fc1's result: 15
    "mlp"    the same without fc1's result, which backward computes again: 11
    "layer"  its input alone: 1; backward runs the layer again, all but fc2

Norms, activations and the attention over time are computed again always, from what is kept anyway: they hold no matrix
product of the layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_adapter.model.fused import spatial, temporal
from bt_adapter.towers import mlp
from bt_adapter.towers.rows import Norm, add_rows, norm, norm_backward
from bt_kernels import VisibleTokens
from bt_kernels._dispatch import forced_backend
from bt_kernels._library import visible_arguments
from bt_kernels.nn.stochastic_depth import frame_weight_and_row_scale, sequence_row_scale


class Layer(NamedTuple):
    """What a layer is but for its tensors. ``product``: the dtype of matrix products; ``sizes``: of the visible
    tokens."""

    heads: int
    temporal_eps: float
    spatial_eps: float
    act: str
    recompute: str
    backend: str | None
    product: torch.dtype
    sizes: tuple


class Scales(NamedTuple):
    """Stochastic depth: of the temporal rows ``[B, N, 1]``, of the frames in CLS's mean ``[B, S]``, of the spatial rows
    ``[B, 1+N, 1]``; None where nothing drops."""

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
) -> Tensor:
    """``spatial_layer(temporal_layer(z))``.

    Args:
        z: the state, ``[B, 1+N, D]``, CLS first.
        temporal_layer, spatial_layer: ``model.branch.TemporalLayer`` and ``SpatialLayer``, whose parameters are
            used.
        visible: which tokens.
        time_scale: stochastic depth of each sequence, ``[B, sequences]``, or None.
        space_scale: of each frame, ``[B, steps]``, or None.
        recompute: "none", "mlp" or "layer".
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
    index, frame_counts, *sizes = visible_arguments(visible)
    if not torch.is_grad_enabled():
        recompute = "layer"  # nothing is kept, and each part's tensors are gone before the next begins
    layer = Layer(
        temporal_layer.attention.heads, temporal_layer.norm.eps, spatial_layer.norm1.eps, spatial_layer.act,
        recompute, forced_backend(None), product, tuple(sizes),
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
    """The tensors of a call, by name."""

    def __init__(self, layer: Layer, index: Tensor, frame_counts: Tensor | None, scales: Scales, weights):
        self.layer, self.scales = layer, scales
        self.visible = (index, frame_counts, *layer.sizes)
        self.norm = Norm(weights[0], weights[1], layer.temporal_eps)
        self.norm1 = Norm(weights[2], weights[3], layer.spatial_eps)
        self.norm2 = Norm(weights[4], weights[5], layer.spatial_eps)
        self.temporal = temporal.Weights(*weights[6:12])
        self.spatial = spatial.Weights(*weights[12:16])
        self.mlp = mlp.Weights(*weights[16:20])

    def temporal_call(self) -> tuple:
        return self.temporal, self.layer.heads, self.scales.temporal, self.visible, self.layer.backend

    def spatial_call(self) -> tuple:
        scales = self.scales
        return self.spatial, self.layer.heads, scales.frame_weight, scales.spatial, self.visible, self.layer.backend


def _until_mlp(z: Tensor, parts: _Parts, keep: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The normalised input of the MLP; the state before it; and what backward wants of the way there, or nothing.

    That is: two tensors of time, the state before the spatial half, four of space.
    """
    product = parts.layer.product
    update, of_time = temporal.forward(norm(z[:, 1:], parts.norm)[0].to(product), *parts.temporal_call())
    x = add_rows(z, update)
    if not keep:
        of_time = ()
    update, of_space = spatial.forward(norm(x, parts.norm1)[0].to(product), *parts.spatial_call())
    y = add_rows(x, update)
    kept = (*of_time, x, *of_space) if keep else ()
    return norm(y, parts.norm2)[0].to(product), y, kept


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, z, index, frame_counts, temporal_scale, frame_weight, spatial_scale, *weights):
        scales = Scales(temporal_scale, frame_weight, spatial_scale)
        parts = _Parts(layer, index, frame_counts, scales, weights)
        with torch.autocast(z.device.type, enabled=False):
            n, y, kept = _until_mlp(z, parts, layer.recompute != "layer")
            hidden = mlp.hidden(n, parts.mlp, layer.act)
            out = mlp.finish(y, hidden, parts.mlp, layer.act)
        if kept:
            kept = (y, *kept, hidden) if layer.recompute == "none" else (y, *kept)
        ctx.layer = layer
        ctx.save_for_backward(z, index, frame_counts, *scales, *weights, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        z, index, frame_counts, *rest = ctx.saved_tensors
        layer, product = ctx.layer, ctx.layer.product
        parts = _Parts(layer, index, frame_counts, Scales(*rest[:3]), rest[3:23])
        with torch.autocast(z.device.type, enabled=False):
            if len(rest) == 23:
                _, y, kept = _until_mlp(z, parts, True)
            else:
                y, *kept = rest[23:]
            qkv, other, x, *attention = kept
            n, *moments = norm(y, parts.norm2)
            n = n.to(product)
            hidden = attention.pop() if len(attention) == 5 else mlp.hidden(n, parts.mlp, layer.act)
            grad_n, mlp_grads = mlp.backward(grad.to(product), n, hidden, parts.mlp, layer.act)
            del hidden
            grad_rows, *norm2_grads = norm_backward(grad_n, y, *moments, parts.norm2)
            grad = grad_rows.add_(grad)

            n, *moments = norm(x, parts.norm1)
            grad_n, spatial_grads = spatial.backward(grad.to(product), n.to(product), attention, *parts.spatial_call())
            grad_rows, *norm1_grads = norm_backward(grad_n, x, *moments, parts.norm1)
            grad = grad_rows.add_(grad)

            rows = z[:, 1:]
            n, *moments = norm(rows, parts.norm)
            update_grad = grad[:, 1:].to(product)
            grad_n, temporal_grads = temporal.backward(update_grad, n.to(product), (qkv, other), *parts.temporal_call())
            grad_rows, *norm_grads = norm_backward(grad_n, rows, *moments, parts.norm)
            grad[:, 1:] += grad_rows
        grads = (*norm_grads, *norm1_grads, *norm2_grads, *temporal_grads, *spatial_grads, *mlp_grads)
        return None, grad, None, None, None, None, None, *grads
