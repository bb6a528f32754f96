"""Definition of alignment_loss in plain PyTorch. Legend: B, T, P, N, D; F width of the shared space."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_kernels._layout import patch_rows
from bt_kernels.ops.alignment_loss.gradients import count_of, stored


def forward(
    branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight, target_norm_bias,
    target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps, target_eps,
    product, wanted,
):  # fmt: skip
    """Return the loss (a mean over the tokens) and the gradients of the sum over the tokens."""
    dtype = branch.dtype
    acc = torch.promote_types(dtype, torch.float32)
    b = _target(target, index, target_norm_weight, target_norm_bias, target_projection, target_projection_bias,
                target_eps, acc)  # fmt: skip
    real = (index >= 0)[:, :, None]
    rows = branch[:, 1:].masked_fill(~real, 0).to(acc)
    weight, gain, shift = head_weight.to(acc), head_norm_weight.to(acc), head_norm_bias.to(acc)
    y = F.linear(rows, weight, head_bias.to(acc))
    a, mean, rstd = torch.ops.aten.native_layer_norm(y, [y.shape[-1]], gain, shift, head_eps)
    length = a.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = a / length
    cosine = (unit * b).sum(-1, keepdim=True)
    loss = ((2 - 2 * cosine) * real).sum().div(count_of(index, slots)).to(dtype)
    if not any(wanted):
        return loss, branch.new_empty(0), *(branch.new_empty(0, dtype=acc) for _ in range(2))
    # d(2 - 2·cos)/da = -2·(b̂ - cos·â)/|a|
    grad_a = (b - cosine * unit) / length * (-2.0 * real)
    grad_y, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
        grad_a, y, [y.shape[-1]], mean, rstd, gain, shift, [True, True, True]
    )
    grad_rows = (grad_y @ weight).to(dtype)
    grads = (
        torch.cat([torch.zeros_like(grad_rows[:, :1]), grad_rows], 1),
        torch.einsum("bnf,bnd->fd", grad_y, rows),
        torch.stack([grad_y.sum((0, 1)), grad_gain, grad_shift]),
    )
    return loss, *(g.contiguous() if each else g.new_empty(0) for g, each in zip(grads, stored(wanted), strict=True))


def _target(target, index, norm_weight, norm_bias, projection, projection_bias, eps, acc) -> Tensor:
    """Project the tower's tokens to unit vectors ``[B, N, F]`` of the shared space."""
    rows = patch_rows(target, index).to(acc)
    rows = F.layer_norm(rows, rows.shape[-1:], norm_weight.to(acc), norm_bias.to(acc), eps)
    bias = None if projection_bias is None else projection_bias.to(acc)
    return F.normalize(F.linear(rows, projection.to(acc), bias), dim=-1)
