"""gather_embed in C++ for CPU (csrc/cpu/gather_embed.cpp) and CUDA (csrc/cuda/gather_embed.cu).

They take one dtype: a tower in another is converted first, as a whole.
"""

import torch
from torch import Tensor


def forward(backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots) -> Tensor:
    return torch.ops.bt_kernels_native.gather_embed(backbone.to(time.dtype), cls_token, pos, time, index, frame_counts)


def backward(grad, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs):
    ops = torch.ops.bt_kernels_native
    if grad.is_cuda:
        shape = grad.new_empty(backbone.shape[-1]).expand(backbone.shape)  # no value of the tower is read
        grads = ops.gather_embed_backward(grad, shape, cls_token, pos, time, index, frame_counts, *needs)
        grads = (grads[0].to(backbone.dtype), *grads[1:])
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
    grad_backbone = None
    if needs[0]:  # as of gather_merge without a gate, but the tower gets half of the gradient of CLS
        halved = torch.cat([grad[:, :1] / 2, grad[:, 1:]], 1)
        flags = (True, False, False)
        shape = grad.new_empty(backbone.shape[-1]).expand(backbone.shape)  # no value of the tower is read
        grad_backbone, *_ = ops.gather_merge_backward(halved, shape, halved, None, index, frame_counts, *flags)
        grad_backbone = grad_backbone.to(backbone.dtype)
    tables = ops.gather_embed_tables_backward(grad, index, patches, frames, len(time), *needs[1:])
    return grad_backbone, *(g if need else None for g, need in zip(tables, needs[1:], strict=True))
