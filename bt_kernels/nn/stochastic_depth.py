"""Stochastic depth of divided attention: which residuals of a video are dropped, and how CLS takes its mean.

Legend: B videos, N visible rows, S frames (slots) of a video; a scale is 0 where dropped, 1/(1 - rate) where kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels.visible import VisibleTokens


def draw_scale(rate: float, batch: int, count: int, like: Tensor) -> Tensor:
    """A draw for each of ``count`` residuals of each video: ``[B, count]``, in float32 or wider."""
    kept = torch.rand(batch, count, device=like.device) >= rate
    return kept.to(torch.promote_types(like.dtype, torch.float32)) / (1 - rate)


def sequence_row_scale(scale: Tensor, visible: VisibleTokens) -> Tensor:
    """The scale of each temporal sequence, ``[B, sequences]``, on its rows: ``[B, N, 1]``."""
    return scale.gather(1, visible.sequence_ids())[:, :, None]


def frame_weight_and_row_scale(scale: Tensor, visible: VisibleTokens) -> tuple[Tensor, Tensor]:
    """What makes ``row_scale · f(spatial_attention(qkv, visible, frame_weight))`` the scaled spatial residual.

    With one scale s_t a frame the residual of CLS is the weighted mean Σ_t w_t·s_t·f(a_t) of its results a_t in the
    frames, f an affine output projection. With c = Σ_t w_t·s_t that is c·f(Σ_t (w_t·s_t/c)·a_t): f is called once,
    as a module, and its bias is weighted too. c = 0, every frame dropped, gives 0 as it should.

    Args:
        scale: ``[B, S]``, none negative.
        visible: the tokens.

    Returns:
        ``frame_weight [B, S]`` and ``row_scale [B, 1+N, 1]``.
    """
    weight = scale * visible.step_weights(scale)
    total = weight.sum(1, keepdim=True)
    rows = scale.gather(1, visible.step_ids())
    return weight / torch.where(total == 0, 1, total), torch.cat([total, rows], 1)[:, :, None]
