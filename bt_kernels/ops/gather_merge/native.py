"""gather_merge in C++ for CPU (csrc/cpu/gather_merge.cpp, row_norm.cpp) and CUDA (csrc/cuda/gather_merge.cu).

They take one dtype: a tower in another is converted first, as a whole.
"""

import torch
from torch import Tensor

from bt_kernels._row_norm import native_norm, native_norm_backward


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.gather_merge(backbone.to(branch.dtype), branch, gate, index, frame_counts)


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    grad_backbone, *grads = torch.ops.bt_kernels_native.gather_merge_backward(
        grad, backbone.to(grad.dtype), branch, gate, index, frame_counts, *needs
    )
    grads = (grad_backbone.to(backbone.dtype), *grads)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def forward_norm(
    backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots, norm_eps
):  # fmt: skip
    out = forward(backbone, branch, gate, index, frame_counts, patches, frames, slots)
    return out, *native_norm(out, index, norm_weight, norm_bias, norm_eps)


def backward_norm(
    grad_out, grad_normed, backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots,
    norm_eps, out, mean, rstd, needs,
):  # fmt: skip
    grad, *norm_grads = native_norm_backward(grad_out, grad_normed, out, norm_weight, index, mean, rstd)
    grads = backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs[:3])
    return *grads, *norm_grads
