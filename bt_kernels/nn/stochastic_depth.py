"""Stochastic depth of divided attention: random scales of the residuals, and the mean for CLS under them.

Legend: B videos, N visible rows, S frames (slots) of a video. A scale is 0 if dropped and 1/(1 - rate) if kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels.visible import VisibleTokens


def draw_scale(rate: float, batch: int, count: int, like: Tensor) -> Tensor:
    """Draw the scale of each of ``count`` residuals of each video: ``[B, count]``, in float32 or wider."""
    kept = torch.rand(batch, count, device=like.device) >= rate
    return kept.to(torch.promote_types(like.dtype, torch.float32)) / (1 - rate)


def sequence_row_scale(scale: Tensor, visible: VisibleTokens) -> Tensor:
    """Expand the scale of each temporal sequence, ``[B, sequences]``, to its rows: ``[B, N, 1]``."""
    return scale.gather(1, visible.sequence_ids())[:, :, None]


def frame_weight_and_row_scale(scale: Tensor, visible: VisibleTokens) -> tuple[Tensor, Tensor]:
    """Return factors such that ``row_scale · f(spatial_attention(qkv, visible, frame_weight))`` is the scaled residual.

    With one scale s_t per frame, the residual of CLS is the weighted mean Σ_t w_t·s_t·f(a_t) of its results a_t in the
    frames, where f is an affine output projection. With c = Σ_t w_t·s_t that is c·f(Σ_t (w_t·s_t/c)·a_t): f is called
    once, as a module, and its bias is weighted too. If every frame is dropped, c = 0 and the residual is 0.

    Args:
        scale: ``[B, S]``, not negative.
        visible: the visible tokens.

    Returns:
        ``frame_weight [B, S]`` and ``row_scale [B, 1+N, 1]``.
    """
    weight = scale * visible.step_weights(scale)
    total = weight.sum(1, keepdim=True)
    rows = scale.gather(1, visible.step_ids())
    return weight / torch.where(total == 0, 1, total), torch.cat([total, rows], 1)[:, :, None]
