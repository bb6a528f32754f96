"""Definition of pool_video_tokens in plain PyTorch. Legend: B, T, P, N, D as in ``bt_kernels.visible``."""

import torch
from torch import Tensor

from bt_kernels._layout import frame_weights, mean_over_frames, zero_padding


def forward(backbone, branch, index, frame_counts, patches, frames, slots) -> Tensor:
    acc = torch.promote_types(branch.dtype, torch.float32)
    tower = mean_over_frames(backbone, frame_counts).to(acc)  # [B, 1+P, D]
    rows = zero_padding(branch[:, 1:], index).to(tower.dtype) * _row_weights(index, patches, frames, tower)
    patch = (index.clamp(min=0) // frames)[:, :, None].expand_as(rows)
    pooled = rows.new_zeros(rows.shape[0], patches, rows.shape[2]).scatter_add(1, patch, rows)  # [B, P, D]
    both = torch.cat([tower[:, 1:] + pooled, tower[:, :1] + branch[:, :1]], 1)
    return (0.5 * both).to(branch.dtype)


def backward(grad, backbone, branch, index, frame_counts, patches, frames, slots, needs):
    weights = frame_weights(frame_counts, backbone.shape[0], backbone.shape[1], grad)
    half = 0.5 * grad.to(weights.dtype)  # [B, P+1, D], CLS last
    half = torch.cat([half[:, -1:], half[:, :-1]], 1)  # CLS first
    grad_backbone = grad_branch = None
    if needs[0]:
        grad_backbone = (weights[:, :, None, None] * half[:, None]).to(backbone.dtype)
    if needs[1]:
        patch = (1 + index.clamp(min=0) // frames)[:, :, None].expand(-1, -1, half.shape[2])
        rows = half.gather(1, patch) * _row_weights(index, patches, frames, weights)
        grad_branch = torch.cat([half[:, :1], rows], 1).to(grad.dtype)
    return grad_backbone, grad_branch


def _row_weights(index: Tensor, patches: int, frames: int, like: Tensor) -> Tensor:
    """Return ``[B, N, 1]``: 1 / (number of visible rows of the row's patch), and 0 for padding rows."""
    patch = index.clamp(min=0) // frames
    real = (index >= 0).to(like.dtype)
    counts = real.new_zeros(index.shape[0], patches).scatter_add(1, patch, real)
    return (real / counts.gather(1, patch).clamp(min=1))[:, :, None]
