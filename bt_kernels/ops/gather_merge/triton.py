"""gather_merge in Triton; the kernels, shared with gather_embed, are in ``bt_kernels/_triton_gather*.py``."""

import torch

from bt_kernels._triton_gather import run_forward
from bt_kernels._triton_gather_backward import RowGrads, merge_backward


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots):
    return run_forward(backbone, index, frame_counts, branch=branch, gate=gate)[0]


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    return merge_backward(RowGrads(grad), backbone, branch, gate, index, frame_counts, needs)[:3]


def forward_norm(
    backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots, norm_eps
):  # fmt: skip
    norm = (norm_weight, norm_bias, norm_eps)
    return run_forward(backbone, index, frame_counts, branch=branch, gate=gate, norm=norm)


def backward_norm(
    grad_out, grad_normed, backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots,
    norm_eps, out, mean, rstd, needs,
):  # fmt: skip
    if grad_normed is None:
        zeros = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        grads = backward(grad_out, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs[:3])
        return *grads, *zeros
    rows = RowGrads(grad_out, grad_normed, norm_weight, (out, mean, rstd))
    return merge_backward(rows, backbone, branch, gate, index, frame_counts, needs[:3])
