"""The branch: divided space-time layers that read the tower's states and run only on the visible tokens.

Legend: B videos, T frames, P patches, N visible tokens, D width, d depth; z is the branch's state [B, 1+N, D], CLS
first; X a tower layer's output [B, T, 1+P, D]. Formulas: arXiv 2309.15785, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bt_adapter.model import fused
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.time_steps import TimeSteps, time_rows
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.layers import EvaAttention, LayerWeights, PackedAttention, branch_attention
from bt_kernels import VisibleTokens, gather_embed, gather_merge, spatial_attention, temporal_attention
from bt_kernels.nn.stochastic_depth import frame_weight_and_row_scale, sequence_row_scale
from bt_kernels.plain import why_not_all_plain

_SPATIAL_EPS = 1e-5  # for CLIP and EVA alike; EVA's tower and temporal layers use 1e-6


class TemporalLayer(nn.Module):
    """Attention over the frames of each patch, followed by a linear layer ``fc`` that is initialised to zero."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = branch_attention(config)
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, z: Tensor, visible: VisibleTokens, scale: Tensor | None) -> Tensor:
        """Compute ``z_patch + fc(scale · out(attn(norm(z_patch))))``; CLS is not changed.

        ``scale`` [B, sequences] is the draw of stochastic depth divided by its keep probability. It is applied before
        ``fc``, so that ``fc``'s bias is kept when a sequence is dropped.
        """
        cls, rows = z[:, :1], z[:, 1:]
        update = self.attention(self.norm(rows), lambda qkv: temporal_attention(qkv, visible))
        if scale is not None:
            update = update * sequence_row_scale(scale, visible).to(update.dtype)
        return torch.cat([cls, rows + self.fc(update)], 1)


class SpatialLayer(LayerWeights):
    """Attention inside each frame, with the video's single CLS in every frame, followed by the MLP."""

    def __init__(self, config: TowerConfig):
        super().__init__(config, _SPATIAL_EPS, branch_attention(config))

    def forward(self, z: Tensor, visible: VisibleTokens, scale: Tensor | None) -> Tensor:
        """Run the layer on ``z``; ``scale`` [B, steps] is the draw of stochastic depth over its keep probability."""
        # Each frame's result is scaled, and CLS gets the mean of these results. Weights inside the attention's mean
        # over frames and one scale per row achieve this with a single call of each projection module.
        weight = row_scale = None
        if scale is not None:
            weight, row_scale = frame_weight_and_row_scale(scale, visible)
        update = self.attention(self.norm1(z), lambda qkv: spatial_attention(qkv, visible, weight))
        if row_scale is not None:
            update = update * row_scale.to(update.dtype)
        z = z + update
        return z + self.mlp(self.norm2(z))


# modules that the fused layers can compute; any other module in a layer is called
_PLAIN_PARTS = (TemporalLayer, SpatialLayer, PackedAttention, EvaAttention)


def _are_plain(temporal: nn.Module, spatial: nn.Module) -> bool:
    """Whether two layers can be computed from their weights: no part is replaced or wrapped, and no bias missing."""
    for layer in (temporal, spatial):
        if why_not_all_plain(layer, _PLAIN_PARTS) is not None:
            return False
        for part in layer.children():
            part = part.out_proj if isinstance(part, (PackedAttention, EvaAttention)) else part
            if getattr(part, "weight", None) is None or getattr(part, "bias", None) is None:
                return False
    return True


def _gate(slope: float | None, parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Compute a gate ``sigmoid(slope · parameter)``, [D] in (0, 1); None without a gate."""
    if slope is None or parameter is None:
        return None
    return torch.sigmoid(slope * parameter).to(dtype)


class Branch(nn.Module):
    """All trainable parts: layers, CLS, time table, gates and the alignment head.

    ``is_absent`` marks the placeholder in a chat model without a branch; it never runs.

    Args:
        tower_config: configuration of its tower.
        config: configuration of the branch.
        layers: number of layers to build (chat needs d - 1); None: all d.
    """

    is_absent = False

    def __init__(self, tower_config: TowerConfig, config: BTAdapterConfig, layers: int | None = None):
        super().__init__()
        if config.depth > tower_config.num_hidden_layers:
            raise ValueError(
                f"depth must be at most the tower's {tower_config.num_hidden_layers} layers, but is {config.depth}"
            )
        self.config = config
        width = tower_config.hidden_size
        layers = config.depth if layers is None else layers
        self.temporal = nn.ModuleList(TemporalLayer(tower_config) for _ in range(layers))
        self.spatial = nn.ModuleList(SpatialLayer(tower_config) for _ in range(layers))
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.time = nn.Parameter(torch.randn(config.max_frames, width) * 0.02)
        # A gate is sigmoid(slope · parameter); its initial value is 0.5.
        self.merge_gate = None if config.merge_gate_slope is None else nn.Parameter(torch.zeros(width))
        self.output_gate = None if config.output_gate_slope is None else nn.Parameter(torch.zeros(width))
        self.alignment_head = None
        if config.alignment_head and tower_config.projection_dim is not None and layers == config.depth:
            shared = tower_config.projection_dim
            self.alignment_head = nn.Sequential(nn.Linear(width, shared), nn.LayerNorm(shared))

    def forward(
        self,
        states: Iterable[Tensor],
        position: Tensor,
        visible: VisibleTokens,
        draws: Iterator[Tensor] | None = None,
        after: Callable[[int, Tensor], object] | None = None,
        plan: TimeSteps | None = None,
    ) -> Tensor:
        """Run one branch layer for each of the tower's states.

        Args:
            states: outputs X of the tower layers that the branch's layers read, ``[B, T, 1+P, D]`` each, in order. The
                next one is requested when the previous branch layer is done.
            position: the tower's position embeddings, ``[1+P, D]``.
            visible: the tokens that the branch processes.
            draws: draws of stochastic depth, as in the model's forward.
            after: called with each layer's index and z after it.
            plan: selects the rows of the time table; None: the first rows as stored.

        Returns:
            z after the last of these layers, ``[B, 1+N, D]``, CLS first.

        Raises:
            RuntimeError: the branch's parameters are sharded over processes and not gathered.
            ValueError: it is the placeholder in a chat model without a branch.
        """
        if self.is_absent:
            raise ValueError(
                "this chat model has no branch: attach one, or ask for the mean of the frames (branch=False)"
            )
        self._check_whole()
        z: Any = None
        for layer, tokens in enumerate(states):
            z = self.embed(tokens, position, visible, plan) if z is None else self.merge(tokens, z, visible)
            z = self.run_layer(layer, z, visible, draws)
            if after is not None:
                after(layer, z)
        return z

    def _check_whole(self) -> None:
        if hasattr(self.cls_token, "full_tensor"):  # a DTensor
            raise RuntimeError(
                "the branch's parameters are sharded (fully_shard) and not gathered here: call the sharded model "
                "itself, or call its unshard() first"
            )

    def embed(self, tokens: Tensor, position: Tensor, visible: VisibleTokens, plan: TimeSteps | None = None) -> Tensor:
        """Compute the first layer's input ``[B, 1+N, D]`` from X and the positions; ``plan``: see `forward`."""
        time = self.time if plan is None else time_rows(self.time, plan)
        return gather_embed(tokens, self.cls_token, position.to(time.dtype), time, visible)

    def merge(self, tokens: Tensor, z: Tensor, visible: VisibleTokens) -> Tensor:
        """Compute a later layer's input: X is mixed into z through the merge gate."""
        slope = self.config.merge_gate_slope
        if self.config.fused and not tokens.requires_grad:
            return fused.merge(tokens, z, self.merge_gate, slope, visible)
        return gather_merge(tokens, z, _gate(slope, self.merge_gate, z.dtype), visible)

    def run_layer(self, layer: int, z: Tensor, visible: VisibleTokens, draws: Iterator[Tensor] | None) -> Tensor:
        """Run temporal, then spatial attention of branch layer ``layer``; ``draws`` as in the model's forward."""
        rate = self.config.drop_rate(layer)

        def scale(count: int) -> Tensor | None:
            return self._draw(rate, visible.batch, count, z, draws)

        time_scale, space_scale = scale(visible.sequences), scale(visible.steps)
        temporal, spatial = self.temporal[layer], self.spatial[layer]
        if self.config.fused and _are_plain(temporal, spatial):
            z = fused.run_layer(
                z, temporal, spatial, visible, time_scale, space_scale, self.config.recompute, self.config.products
            )
        elif self.config.recompute != "none" and torch.is_grad_enabled():
            # modules cannot recompute single parts, so backward runs the whole layer again
            z = checkpoint(_call, temporal, spatial, z, visible, time_scale, space_scale, use_reentrant=False)
        else:
            z = _call(temporal, spatial, z, visible, time_scale, space_scale)
        if self.config.drop_block and (kept := scale(1)) is not None:
            z = z * kept[:, :, None].to(z.dtype)
        return z

    def mix_output(self, z_cls: Tensor, tower_cls: Tensor) -> Tensor:
        """Mix the CLS of branch and frames, ``[B, D]`` and ``[B, T, D]`` to ``[B, T, D]``, through the output gate."""
        self._check_whole()
        gate = _gate(self.config.output_gate_slope, self.output_gate, z_cls.dtype)
        if gate is None:
            return z_cls[:, None] + tower_cls
        return torch.lerp(z_cls[:, None], tower_cls, gate)

    def _draw(self, rate: float, batch: int, count: int, like: Tensor, draws: Iterator[Tensor] | None) -> Tensor | None:
        """Draw stochastic depth's scale ``[B, count]``: 0 if dropped, 1/(1 - rate) if kept; None: no drops."""
        if rate == 0 or not (self.training or draws is not None):
            return None
        dtype = torch.promote_types(like.dtype, torch.float32)
        if draws is None:
            kept = torch.rand(batch, count, device=like.device) >= rate
        else:
            kept = next(draws).to(like.device).reshape(batch, count)
        return kept.to(dtype) / (1 - rate)


def _call(
    temporal: nn.Module, spatial: nn.Module, z: Tensor, visible: VisibleTokens, time_scale: Tensor | None,
    space_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    return spatial(temporal(z, visible, time_scale), visible, space_scale)
