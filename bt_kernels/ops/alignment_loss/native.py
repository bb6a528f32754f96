"""alignment_loss in C++ for CPU: the passes over rows (csrc/cpu/alignment_loss.cpp). The rest is in ``chunks.py``."""

import torch

from bt_kernels.ops.alignment_loss import chunks


class _Rows:
    @staticmethod
    def gather_norm(target, index, first, count, weight, bias, eps, dtype):
        if torch.promote_types(target.dtype, torch.float32) != weight.dtype:
            target = target.to(weight.dtype)
        return torch.ops.bt_kernels_native.alignment_gather_norm(target, index, first, count, weight, bias, eps)

    @staticmethod
    def cosine(y, b, index, first, gain, shift, eps, grads, dtype):
        return torch.ops.bt_kernels_native.alignment_cosine(y, b, index, first, gain, shift, eps, grads)


def forward(*args):
    return chunks.forward(_Rows, *args)
