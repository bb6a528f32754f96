"""gather_merge in C++ for CPU (csrc/cpu/gather_merge.cpp) and CUDA (csrc/cuda/gather_merge.cu)."""

import torch
from torch import Tensor


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.gather_merge(backbone, branch, gate, index, frame_counts)


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    grads = torch.ops.bt_kernels_native.gather_merge_backward(grad, backbone, branch, gate, index, frame_counts, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def forward_norm(*args):
    raise NotImplementedError


def backward_norm(*args):
    raise NotImplementedError
