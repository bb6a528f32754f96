"""spatial_attention in C++ for CPU (csrc/cpu/spatial_attention.cpp)."""

import torch
from torch import Tensor


def forward(qkv, frame_weight, index, frame_counts, patches, frames, slots) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.bt_kernels_native.spatial_attention(qkv, frame_weight, index, frame_counts, patches, frames, slots)


def backward(grad, qkv, frame_weight, index, frame_counts, patches, frames, slots, out, lse, cls_out, needs):
    return (
        torch.ops.bt_kernels_native.spatial_attention_backward(
            grad, qkv, frame_weight, index, frame_counts, patches, frames, slots, out, lse, cls_out
        ),
    )
