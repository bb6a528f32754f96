"""Merge the tower's tokens into the branch's without storing the tower's state for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels import VisibleTokens, passes


def merge(tokens: Tensor, z: Tensor, parameter: Tensor | None, slope: float | None, visible: VisibleTokens) -> Tensor:
    """Compute ``m = (1 - w)·z + w·tokens`` for the visible tokens, with the gate w = sigmoid(slope·parameter).

    The tower must be frozen. All gradients follow from m and z, since w·(tokens - z) = m - z; that of the parameter is
    ``slope·(1 - w)·Σ grad·(m - z)``. The tower's state is therefore not stored, and there is no division by a gate that
    may be 0.

    Args:
        tokens: the tower's state, ``[B, T, 1+P, D]``, which gets no gradient.
        z: the branch's state, ``[B, 1+N, D]``.
        parameter: the gate's parameter, ``[D]``; None without a gate: m = z + tokens.
        slope: the gate's slope; None without a gate.
        visible: the tokens that the branch processes.

    Returns:
        m, ``[B, 1+N, D]``.
    """
    if parameter is None or slope is None:
        return _PlainMerge.apply(tokens, z, passes.forced_backend(), *visible.as_arguments())
    return _GatedMerge.apply(tokens, z, parameter, slope, passes.forced_backend(), *visible.as_arguments())


class _PlainMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, z, backend, *visible):
        return passes.gather_merge(tokens, z, None, visible, backend)

    @staticmethod
    def backward(ctx, grad):
        return None, grad, *[None] * 6


class _GatedMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, z, parameter, slope, backend, *visible):
        gate = torch.sigmoid(slope * parameter)
        merged = passes.gather_merge(tokens, z, gate.to(z.dtype), visible, backend)
        ctx.slope, ctx.backend = slope, backend
        ctx.save_for_backward(z, merged, gate)
        return merged

    @staticmethod
    def backward(ctx, grad):
        z, merged, gate = ctx.saved_tensors
        # the op's gradient of the gate is Σ grad·(tokens - z); with m in place of tokens it is Σ grad·(m - z). m is
        # passed as a tower state of one frame whose patches are all visible
        tokens = z.shape[1] - 1
        index = torch.arange(tokens, device=z.device).expand(z.shape[0], -1)
        _, grad_z, grad_gate = passes.gather_merge_backward(
            grad, merged[:, None], z, gate.to(z.dtype), (index, None, tokens, 1, 1), (False, True, True), ctx.backend
        )
        grad_gate = grad_gate.to(gate.dtype)
        grad_parameter = torch.addcmul(grad_gate, grad_gate, gate, value=-1).mul_(ctx.slope)
        return None, grad_z, grad_parameter, *[None] * 7
