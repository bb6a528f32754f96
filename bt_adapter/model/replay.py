"""Replay tower and branch as one CUDA graph, for chat: one video's kernels are shorter than their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.model.branch import Branch, SpatialLayer, TemporalLayer
from bt_adapter.towers.layers import PLAIN_PARTS, PackedAttention
from bt_adapter.towers.tower import Tower
from bt_kernels import passes
from bt_kernels.plain import why_not_all_plain

_PLAIN = (*PLAIN_PARTS, nn.ModuleList, nn.Sequential, Branch, TemporalLayer, SpatialLayer, PackedAttention)


def can_replay(model: Any, pixel_values: Tensor) -> bool:
    """Whether the whole of ``model.video_tokens`` on these frames is the same work each time, and graphs are asked for.

    A graph makes no Python calls and no new draws. It is thus not used with gradients, autocast, stochastic depth, a
    wrapped branch, or a part that was replaced or wrapped.
    """
    tower, branch = model.tower, model.branch
    if not isinstance(tower, Tower) or tower.graphs is None or torch.is_grad_enabled():
        return False
    draws = branch.training and branch.config.drop_path > 0
    if draws or model.branch_wrapper is not None or torch.is_autocast_enabled(pixel_values.device.type):
        return False
    return all(why_not_all_plain(part, _PLAIN) is None for part in (tower.layers, branch))


def replay(model: Any, pixel_values: Tensor, compute: Callable[[Tensor], Tensor], *options: Any) -> Tensor:
    """Return ``compute(pixel_values)`` from a CUDA graph, which is recorded at the first call for these options."""
    tower = model.tower
    key = ("video_tokens", model.config, tower.chunk, passes.forced_backend(), *options)

    def without_graphs(pixels: Tensor) -> Tensor:
        graphs, tower.graphs = tower.graphs, None
        try:
            return compute(pixels)
        finally:
            tower.graphs = graphs

    return tower.graphs(key, without_graphs, pixel_values).clone()  # the next call overwrites the graph's own result
