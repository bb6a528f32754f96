"""Definition of alignment_loss in plain PyTorch. Legend: B, T, P, N, D; F width of the shared space."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_kernels._layout import patch_rows


def forward(
    branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight, target_norm_bias,
    target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps, target_eps,
) -> Tensor:  # fmt: skip
    dtype = branch.dtype
    wide = torch.promote_types(dtype, torch.float32)
    b = _target(target, index, target_norm_weight, target_norm_bias, target_projection, target_projection_bias,
                target_eps, wide)  # fmt: skip
    rows = branch[:, 1:].masked_fill((index < 0)[:, :, None], 0).to(wide)
    y = F.linear(rows, head_weight.to(wide), head_bias.to(wide))
    a = F.layer_norm(y, y.shape[-1:], head_norm_weight.to(wide), head_norm_bias.to(wide), head_eps)
    cosine = (F.normalize(a, dim=-1) * b).sum(-1)
    real = index >= 0
    return ((2 - 2 * cosine) * real).sum().div(real.sum().clamp(min=1)).to(dtype)


def backward(
    grad, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots,
    head_eps, target_eps, needs,
):  # fmt: skip
    dtype = branch.dtype
    wide = torch.promote_types(dtype, torch.float32)
    b = _target(target, index, target_norm_weight, target_norm_bias, target_projection, target_projection_bias,
                target_eps, wide)  # fmt: skip
    real = (index >= 0)[:, :, None]
    rows = branch[:, 1:].masked_fill(~real, 0).to(wide)
    weight, gain, shift = head_weight.to(wide), head_norm_weight.to(wide), head_norm_bias.to(wide)
    y = F.linear(rows, weight, head_bias.to(wide))
    a, mean, rstd = torch.ops.aten.native_layer_norm(y, [y.shape[-1]], gain, shift, head_eps)
    # d(2 - 2·cos)/da = -2·(b̂ - cos·â)/|a|
    length = a.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = a / length
    cosine = (unit * b).sum(-1, keepdim=True)
    scale = -2 * grad.to(wide) / real.sum().clamp(min=1)
    grad_a = (b - cosine * unit) / length * (scale * real)
    grad_y, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
        grad_a, y, [y.shape[-1]], mean, rstd, gain, shift, [True, needs[3], needs[4]]
    )
    grad_branch = None
    if needs[0]:
        grad_rows = grad_y @ weight
        grad_branch = torch.cat([torch.zeros_like(grad_rows[:, :1]), grad_rows], 1)
    grads = (
        grad_branch,
        torch.einsum("bnf,bnd->fd", grad_y, rows) if needs[1] else None,
        grad_y.sum((0, 1)) if needs[2] else None,
        grad_gain if needs[3] else None,
        grad_shift if needs[4] else None,
    )
    return tuple(None if g is None else g.to(dtype) for g in grads)


def _target(target, index, norm_weight, norm_bias, projection, projection_bias, eps, wide) -> Tensor:
    """Unit vectors ``[B, N, F]`` of the tower's tokens in the shared space."""
    rows = patch_rows(target, index).to(wide)
    rows = F.layer_norm(rows, rows.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps)
    bias = None if projection_bias is None else projection_bias.to(wide)
    return F.normalize(F.linear(rows, projection.to(wide), bias), dim=-1)
