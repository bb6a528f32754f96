"""Definition of temporal_attention in plain PyTorch. Legend: B, N, H, E; G sequences of S steps (``_layout``)."""

import torch
from torch import Tensor

from bt_kernels._layout import from_grid, to_grid, visible_grid
from bt_kernels._softmax_attention import attend, attend_backward


def forward(qkv, index, frame_counts, patches, frames, slots) -> Tensor:
    q, k, v = to_grid(qkv, index, patches, frames, slots).unbind(3)  # [B, G, S, H, E]
    out = attend(q, k, v, visible_grid(index, patches, frames, slots))
    return from_grid(out, index, slots).contiguous()  # as the fake kernel declares; a single sequence is permuted


def backward(grad, qkv, index, frame_counts, patches, frames, slots, needs):
    q, k, v = to_grid(qkv, index, patches, frames, slots).unbind(3)
    grad = to_grid(grad, index, patches, frames, slots)
    grads = attend_backward(grad, q, k, v, visible_grid(index, patches, frames, slots))
    return (from_grid(torch.stack(grads, 3), index, slots),)
