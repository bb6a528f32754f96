"""pool_video_tokens in C++ for CPU (csrc/cpu/pool_video_tokens.cpp) and CUDA (csrc/cuda/pool_video_tokens.cu).

They take one dtype: a tower in another is converted first, as a whole.
"""

import torch
from torch import Tensor


def forward(backbone, branch, index, frame_counts, patches, frames, slots) -> Tensor:
    run = torch.ops.bt_kernels_native.pool_video_tokens
    return run(backbone.to(branch.dtype), branch, index, frame_counts, patches, frames)


def backward(grad, backbone, branch, index, frame_counts, patches, frames, slots, needs):
    run = torch.ops.bt_kernels_native.pool_video_tokens_backward
    shape = grad.new_empty(backbone.shape[-1]).expand(backbone.shape)  # no value of the tower is read
    grads = run(grad, shape, branch, index, frame_counts, patches, frames, *needs)
    grads = (grads[0].to(backbone.dtype), *grads[1:])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
