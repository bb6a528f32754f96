"""temporal_attention in C++ for CPU (csrc/cpu/temporal_attention.cpp) and CUDA (csrc/cuda/temporal_attention.cu)."""

import torch
from torch import Tensor


def forward(qkv, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.temporal_attention(qkv, index, frames, slots)


def backward(grad, qkv, index, frame_counts, patches, frames, slots, needs):
    return (torch.ops.bt_kernels_native.temporal_attention_backward(grad, qkv, index, frames, slots),)
