"""alignment_loss in C++ for CPU: the passes over rows (csrc/cpu/alignment_loss.cpp). The rest is in ``chunks.py``."""

import torch

from bt_kernels.ops.alignment_loss import chunks


class _Rows:
    @staticmethod
    def product_dtype(branch: torch.Tensor) -> torch.dtype:
        return torch.promote_types(branch.dtype, torch.float32)

    @staticmethod
    def gather_norm(target, places, first, weight, bias, eps, dtype):
        count = min(chunks.CHUNK, len(places) - first)
        return torch.ops.bt_kernels_native.alignment_gather_norm(target, places, first, count, weight, bias, eps)

    @staticmethod
    def cosine(y, b, places, gain, shift, eps, grads, dtype):
        losses, grad_y, sums = torch.ops.bt_kernels_native.alignment_cosine(y, b, places, gain, shift, eps, grads)
        return losses, grad_y, sums


def forward(*args):
    return chunks.forward(_Rows, *args)
