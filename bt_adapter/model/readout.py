"""Read CLS and the mean of the patch tokens off the branch's last state."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels import VisibleTokens


def cls_and_mean(z: Tensor, visible: VisibleTokens) -> tuple[Tensor, Tensor]:
    """Return CLS and the mean over the visible patch tokens of ``z [B, 1+N, D]``, ``[B, D]`` each.

    Equal to ``z[:, 0]`` and ``z[:, 1:].mean(1)``, without padding rows, but backward writes the gradient of z once, and
    z is not kept for it. A video without a visible token has the mean 0.
    """
    return _ClsAndMean.apply(z, None if visible.slots is not None else visible.index >= 0)


class _ClsAndMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, real):
        dtype = torch.promote_types(z.dtype, torch.float32)
        ctx.tokens = z.shape[1] - 1
        ctx.save_for_backward(real)
        rows = z[:, 1:] if real is None else z[:, 1:].masked_fill(~real[:, :, None], 0)
        mean = rows.sum(1, dtype=dtype) / _count(real, ctx.tokens)
        return z[:, 0].clone(), mean.to(z.dtype)

    @staticmethod
    def backward(ctx, grad_cls, grad_mean):
        (real,) = ctx.saved_tensors
        rows = (grad_mean / _count(real, ctx.tokens)).to(grad_mean.dtype)[:, None].expand(-1, ctx.tokens, -1)
        if real is not None:
            rows = rows * real[:, :, None]
        return torch.cat([grad_cls[:, None], rows], 1), None


def _count(real: Tensor | None, tokens: int) -> Tensor | int:
    """Return the number of visible tokens, one for all videos or ``[B, 1]``, at least 1."""
    return max(tokens, 1) if real is None else real.sum(1, keepdim=True).clamp(min=1)
