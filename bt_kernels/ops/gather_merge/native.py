"""gather_merge in C++ for CPU (csrc/cpu/gather_merge.cpp) and CUDA (csrc/cuda/gather_merge.cu).

They take one dtype: a tower in another is converted first, as a whole.
"""

import torch
from torch import Tensor


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.gather_merge(backbone.to(branch.dtype), branch, gate, index, frame_counts)


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    grad_backbone, *grads = torch.ops.bt_kernels_native.gather_merge_backward(
        grad, backbone.to(grad.dtype), branch, gate, index, frame_counts, *needs
    )
    grads = (grad_backbone.to(backbone.dtype), *grads)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
