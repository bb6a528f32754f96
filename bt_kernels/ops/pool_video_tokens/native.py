"""pool_video_tokens in C++ for CPU (csrc/cpu/pool_video_tokens.cpp) and CUDA (csrc/cuda/pool_video_tokens.cu)."""

import torch
from torch import Tensor


def forward(backbone, branch, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.pool_video_tokens(backbone, branch, index, frame_counts, patches, frames)


def backward(grad, backbone, branch, index, frame_counts, patches, frames, slots, needs):
    run = torch.ops.bt_kernels_native.pool_video_tokens_backward
    grads = run(grad, backbone, branch, index, frame_counts, patches, frames, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
